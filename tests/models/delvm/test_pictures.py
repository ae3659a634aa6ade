"""Pictures in, pictures out: the session over the engine, and `mindvlm-predict`."""

import numpy as np
import pytest
from PIL import Image

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.generation.request import Request
from mindvlm.models.delvm.config import parse_config
from mindvlm.processing.code_processor import find_pairs
from mindvlm.tools.check_model import main as check
from mindvlm.tools.predict_llm import main as predict
from tests.tiny_delvm import training_tensors, write_hf, write_training, write_vqgan


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted decoder, the VQGAN, the checkpoint of the training, and pictures."""
    root = tmp_path_factory.mktemp("delvm")
    training = write_training(root / "training")
    write_hf(root / "hf", training)
    write_vqgan(root / "vqgan", training_tensors())
    rng = np.random.default_rng(0)
    (root / "pairs").mkdir()
    (root / "queries").mkdir()
    for name in ("pairs/0_img", "pairs/0_label", "pairs/1_img", "pairs/1_label", "queries/a", "queries/b"):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
        coarse.resize((40, 30)).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def model(folders):
    return load(folders)


def load(folders, folder="hf", **changes):
    vqgan = {} if folder == "training" else {"vqgan": str(folders / "vqgan")}
    return mindvlm.load(folders / folder, device="cpu", mode="pynative", cache=False, **vqgan, **changes)


def pairs_of(folders):
    return [(folders / f"pairs/{n}_img.png", folders / f"pairs/{n}_label.png") for n in (0, 1)]


def test_both_forms_generate_the_same_pictures(folders, model):
    queries = [folders / "queries/a.png", folders / "queries/b.png"]
    results = model.complete(queries, pairs_of(folders))
    assert [result.size for result in results] == [(8, 8)] * 2
    assert results[0].tobytes() != results[1].tobytes()
    other = load(folders, "training")
    assert [one.tobytes() for one in other.complete(queries, pairs_of(folders))] == [one.tobytes() for one in results]


def test_a_batch_equals_single_queries(folders, model):
    queries = [folders / "queries/a.png", folders / "queries/b.png"]
    for options in ({}, {"do_sample": True, "temperature": 1.5, "seed": 3}):
        together = model.complete(queries, pairs_of(folders), **options)
        for number, query in enumerate(queries):
            seed = {"seed": 3 + number} if options else {}
            (alone,) = model.complete(query, pairs_of(folders), **{**options, **seed})
            assert alone.tobytes() == together[number].tobytes()
    sampled = model.complete(queries[0], pairs_of(folders), do_sample=True, temperature=1.5, seed=4)
    assert sampled[0].tobytes() != together[0].tobytes()


def test_a_prompt_is_pictures_in_order(folders, model):
    codes = model.encode([folders / "pairs/0_img.png", folders / "queries/a.png"])
    assert codes.shape == (2, 16) and codes.dtype == np.int32
    prompt = codes.reshape(-1).tolist()
    (generated,) = model.continue_codes([prompt], 16)
    (slot,) = model.engine.complete([Request(ids=prompt, options=model.generation_config({"max_new_tokens": 16}))])
    assert slot.new_ids == generated
    (shown,) = model.continue_pictures([folders / "pairs/0_img.png", folders / "queries/a.png"])
    assert shown.tobytes() == model.decode([generated])[0].tobytes()


def test_a_video_goes_on_beyond_the_context(folders, model, monkeypatch):
    monkeypatch.setattr(model.engine, "max_length", 3 * 16)
    frames = [folders / "queries/a.png", folders / "queries/b.png"]
    found = model.continue_pictures(frames, 3)
    second = model.continue_pictures([frames[1], found[0]])[0]
    # the first two frames of the second window are codes, not decoded pictures
    codes = model.encode(frames).tolist()
    (first,) = model.continue_codes([[*codes[0], *codes[1]]], 16)
    (expected,) = model.continue_codes([[*codes[1], *first]], 16)
    assert found[1].tobytes() == model.decode([expected])[0].tobytes()
    assert len(found) == 3 and second.size == (8, 8)


def test_each_prompt_of_a_sampled_video_has_its_own_seed(folders, model, monkeypatch):
    monkeypatch.setattr(model.engine, "max_length", 2 * 16)
    frames = model.continue_pictures([folders / "queries/a.png"], 2, do_sample=True, temperature=1e4, seed=1)
    assert frames[0].tobytes() != frames[1].tobytes()


@pytest.mark.parametrize(("part", "message"), [("decoder", "the decoder computes NaN"), ("encoder", "the encoder")])
def test_pictures_without_values_are_refused(folders, tmp_path, part, message):
    """A picture of NaN would be written as a black one, and a latent of NaN would get code 0."""
    tensors = training_tensors()
    tensors[f"model.embedding.vq_model.{part}.conv_out.weight"][:] = 1e38
    vqgan = write_vqgan(tmp_path / "vqgan", tensors)
    broken = mindvlm.load(folders / "hf", vqgan=str(vqgan), device="cpu", mode="pynative", cache=False)
    with pytest.raises(UserError, match=message):
        broken.decode([[1] * 16]) if part == "decoder" else broken.encode([folders / "queries/a.png"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.continue_codes([[0, 40]], 16), "code 40 is out of range; expected 0 to 39"),
        (lambda m: m.decode([[-1] * 16]), "code -1 is out of range"),
        (lambda m: m.decode([[0] * 15]), r"codes of a picture of shape \(15,\); expected \(16,\)"),
        (lambda m: m.decode([0] * 16), r"codes of a picture of shape \(\); expected \(16,\)"),
        (lambda m: m.continue_codes([[1.5]], 16), "code 1.5 is of type float; expected a whole number"),
        (lambda m: m.continue_codes([["a"]], 16), "code 'a' is of type str; expected a whole number"),
        (lambda m: m.complete(Image.new("RGB", (8, 8)), [("a", "b", "c")]), "an example of 3 pictures; expected pairs"),
        (lambda m: m.complete(Image.new("RGB", (8, 8)), ["ab"]), "an example of 1 pictures; expected pairs"),
        (lambda m: m.continue_codes([[]], 16), "the prompt has 0 codes"),
        (lambda m: m.continue_codes([[0] * 2040], 16), "2040 codes and 16 .* holds 2048; give 1 to 127 pictures"),
        (lambda m: m.continue_codes([[0]], 16, max_new_tokens=5), "max_new_tokens has no effect"),
        (lambda m: m.continue_pictures([], 0), "num_pictures is 0; expected at least 1"),
    ],
)
def test_bad_input_is_refused(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_pictures_of_any_mode_become_square(model):
    for mode, size in (("L", (50, 20)), ("RGBA", (20, 60)), ("P", (16, 17)), ("1", (33, 16)), ("I;16", (20, 20))):
        assert model.processor.pixels(Image.new(mode, size)).shape == (3, 8, 8)


def test_a_decoder_without_its_vqgan_is_refused(folders):
    with pytest.raises(UserError, match=r"describes no vqgan, .* give its folder as vqgan \(--vqgan\)"):
        mindvlm.load(folders / "hf", mode="pynative")
    with pytest.raises(UserError, match="vqgan .*queries: is no folder with the config.json of a VQGAN"):
        mindvlm.load(folders / "hf", vqgan=str(folders / "queries"), mode="pynative")


def test_a_size_that_is_not_that_of_the_model_is_refused(tmp_path):
    data = {"family": "delvm", "checkpoint": "x", "processor": {"size": 128}}
    data["model"] = {"vqgan": {}, "language_model": {"vocab_size": 8192, "hidden_size": 16, "num_hidden_layers": 1}}
    data["model"]["language_model"] |= {"num_attention_heads": 2, "head_dim": 8, "intermediate_size": 32}
    with pytest.raises(UserError, match="processor.size is 128 but model.vqgan.resolution 256; drop it"):
        parse_config(data, tmp_path / "x.yaml")


@pytest.mark.parametrize("key", ["max_new_tokens", "max_repeated_tokens", "stop_strings"])
def test_options_of_texts_are_refused_in_a_yaml(tmp_path, key):
    data = {"family": "delvm", "checkpoint": "x", "model": {"vqgan": {}, "language_model": {"vocab_size": 8192}}}
    data["model"]["language_model"] |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    data["model"]["language_model"] |= {"head_dim": 8, "intermediate_size": 32}
    parse_config(data | {"generation": {"seed": 1}}, tmp_path / "x.yaml")
    data["generation"] = {key: ["a"] if key == "stop_strings" else 5}
    with pytest.raises(UserError, match=f"x.yaml: generation.{key} has no effect: a picture has 256 codes; remove it"):
        parse_config(data, tmp_path / "x.yaml")


def run(folders, tmp_path, monkeypatch, *arguments):
    monkeypatch.chdir(tmp_path)
    paths = ["--config_path", str(folders / "hf"), "--vqgan", str(folders / "vqgan")]
    return predict([*paths, "--device", "cpu", "--mode", "pynative", "--no_cache", *map(str, arguments)])


def test_predict_writes_pictures(folders, tmp_path, monkeypatch, model, capsys):
    pairs = ["--prompt_pairs", folders / "pairs"]
    assert (
        run(folders, tmp_path, monkeypatch, "--image_dir", folders / "queries/a.png", *pairs, "--output", "a.png") == 0
    )
    (expected,) = model.complete(folders / "queries/a.png", pairs_of(folders))
    assert Image.open(tmp_path / "a.png").tobytes() == expected.tobytes()
    assert run(folders, tmp_path, monkeypatch, "--image_dir", folders / "queries", *pairs, "--grid") == 0
    grids = [Image.open(tmp_path / f"{name}_prediction.png") for name in "ab"]
    # three lines of two pictures of 8 pixels, with captions and margins
    assert [grid.size for grid in grids] == [(28, 88)] * 2
    right_bottom = grids[0].crop((16, 76, 24, 84))
    assert right_bottom.tobytes() == expected.tobytes()


def test_a_bad_picture_does_not_stop_the_others(folders, tmp_path, monkeypatch, capsys):
    queries = tmp_path / "queries"
    queries.mkdir()
    (queries / "a.png").write_bytes((folders / "queries/a.png").read_bytes())
    (queries / "b.png").write_bytes(b"no picture")
    pairs = ["--prompt_pairs", folders / "pairs"]
    assert run(folders, tmp_path, monkeypatch, "--image_dir", queries, *pairs, "--output", "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_prediction.png"]
    said = capsys.readouterr().err
    assert "b.png: " in said and "1 of 2 pictures failed" in said


def test_the_model_is_checked(folders, capsys):
    paths = ["--config_path", str(folders / "hf"), "--vqgan", str(folders / "vqgan")]
    assert check([*paths, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "none: the model generates pictures" in said and said.endswith("ready\n")


def test_predict_continues_a_video(folders, tmp_path, monkeypatch):
    assert run(folders, tmp_path, monkeypatch, "--image_dir", folders / "queries", "--num_frames", 2) == 0
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == ["000000.png", "000001.png", "video.gif"]
    assert Image.open(tmp_path / "frames/video.gif").n_frames == 4


def test_predict_refuses_what_has_no_effect(folders, tmp_path, monkeypatch, capsys):
    query = ["--image_dir", folders / "queries/a.png"]
    for arguments, message in (
        (query, "add --prompt_pairs FOLDER with examples, or --num_frames"),
        ([*query, "--query", "what?"], "reads no text; leave --query and --chat_mode out"),
        ([*query, "--prompt_pairs", folders / "queries"], "is no NAME_img or NAME_label"),
        ([*query, "--num_frames", 1, "--grid"], "leave --prompt_pairs and --grid out"),
        ([*query, "--prompt_pairs", folders / "pairs", "--max_new_tokens", 3], "max_new_tokens has no effect"),
    ):
        assert run(folders, tmp_path, monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.write_text("")
    for task in (["--prompt_pairs", folders / "pairs"], ["--num_frames", 1]):
        assert run(folders, tmp_path, monkeypatch, *query, *task, "--output", taken) == 2
        assert f"--output {taken}: no folder can be created there (File exists)" in capsys.readouterr().err
    odd = tmp_path / "odd"
    odd.mkdir()
    Image.new("RGB", (4, 4)).save(odd / "x_img.png")
    assert run(folders, tmp_path, monkeypatch, *query, "--prompt_pairs", odd) == 2
    assert "holds x_img.png but no x_label beside it" in capsys.readouterr().err


def test_pairs_are_complete_and_unambiguous(tmp_path):
    with pytest.raises(UserError, match="holds no pairs NAME_img.png and NAME_label.png"):
        find_pairs(tmp_path)
    for name in ("0_img.png", "0_label.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    assert find_pairs(tmp_path) == [(tmp_path / "0_img.png", tmp_path / "0_label.png")]
    for name, message in (("0_img.jpg", "0_img.jpg and 0_img.png; remove"), ("x.PNG", "x.PNG: is no NAME_img or")):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
        with pytest.raises(UserError, match=message):
            find_pairs(tmp_path)
        (tmp_path / name).unlink()


def test_a_folder_may_have_a_dot_in_its_name(folders, tmp_path, monkeypatch):
    (tmp_path / "run.1").mkdir()
    query = ["--image_dir", folders / "queries/a.png", "--prompt_pairs", folders / "pairs"]
    assert run(folders, tmp_path, monkeypatch, *query, "--output", tmp_path / "run.1") == 0
    assert (tmp_path / "run.1/a_prediction.png").is_file()
