"""Every error of `mindvlm-predict`: exit status 2, one line that names the thing, nothing written."""

import pytest
from PIL import Image

from tests.tiny_vary import picture, tiny_config, write_yaml
from tests.tools.refusals import assert_refused


def make_bad_image(folder, kind: str):
    path = folder / "bad.png"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no picture at all")
    elif kind == "cut":
        picture().save(path)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "huge":
        Image.new("1", (20000, 20000)).save(path)
    return path


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("absent", "does not exist"),
        ("empty", "empty"),
        ("text", "not an image"),
        ("cut", "damaged"),
        ("huge", "400000000 pixels, the limit"),
    ],
)
@pytest.mark.parametrize("with_output", [False, True])
def test_a_bad_picture(loaded, run, tmp_path, kind, expected, with_output):
    path, output = make_bad_image(tmp_path, kind), tmp_path / "out.jsonl"
    arguments = ["--output", output] if with_output else []
    assert_refused(run("--image_dir", path, *arguments), "bad.png", expected)
    assert not output.exists()


def test_a_path_that_does_not_exist_among_several(loaded, run, images, tmp_path):
    output = tmp_path / "out.jsonl"
    assert_refused(run("--image_dir", images / "a.png", images / "x.png", "--output", output), "x.png does not exist")
    assert not output.exists() and not loaded


def test_a_picture_elsewhere(loaded, run, tmp_path):
    assert_refused(run("--image_dir", "https://example.com/a.png"), "https://example.com/a.png: a URL; download")
    assert_refused(run("--image_dir", "http://host:80\r\nX:y"), r"image http://host:80\r\nX:y: a URL")
    assert_refused(run("--image_dir", "none\n.png"), r"none\n.png does not exist")
    (tmp_path / "page.svg").write_bytes(b"<svg/>")
    assert_refused(run("--image_dir", tmp_path), "holds no pictures but page.svg")
    assert not loaded


def test_nothing_to_look_at(loaded, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(run("--image_dir", empty), "holds no pictures")
    assert_refused(run(), "no picture given; add --image_dir")
    assert not loaded


@pytest.mark.parametrize(
    "query, several, expected",
    [
        ("x" * 400, False, "tokens but the context holds 320"),
        ("x" * 400, True, "tokens but the context holds 320"),
        ("<image> <image>", False, "1 image for 2 <image> markers: give one image per marker"),
        ("<image> <image>", True, "3 images for 2 <image> markers: give one image per marker"),
    ],
)
def test_a_query_that_no_picture_can_answer(loaded, run, images, tmp_path, query, expected, several):
    output = tmp_path / "out.jsonl"
    target = images if several else images / "a.png"
    assert_refused(run("--image_dir", target, "--query", query, "--output", output), expected)
    assert not output.exists()


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--max_new_tokens", "0", "max_new_tokens is 0"),
        ("--temperature", "0", "temperature is 0"),
        ("--top_p", "1.5", "top_p is 1.5"),
        ("--repetition_penalty", "-1", "repetition_penalty is -1"),
        ("--seed", "-1", "seed is -1"),
        ("--stop", "", "stop_strings"),
    ],
)
def test_bad_generation_options(loaded, run, option, value, expected):
    assert_refused(run("--query", "hello", option, value), expected)


@pytest.mark.parametrize("option", [["--max_new_tokens", "many"], ["--mode", "eager"], ["--chat_mode", "maybe"]])
def test_what_argparse_refuses(run, option):
    with pytest.raises(SystemExit) as caught:
        run("--query", "hello", *option)
    assert caught.value.code == 2


def test_a_format_without_texts(run, images):
    refused = run("--image_dir", images / "a.png", "--text_format", "md")
    assert_refused(refused, "--text_format md has no effect without --output_dir; add it")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["page.png"], "argument page.png; add --image_dir before pictures and documents"),
        (["--other", "page.png"], "option --other"),
        (["--page=1"], "option --page; did you mean --pages?"),
    ],
)
def test_unknown_arguments(capsys, run, arguments, said):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: unknown {said}; see mindvlm-predict --help\n"


@pytest.mark.parametrize("target", ["folder", "missing/out.jsonl"])
def test_an_unwritable_output_is_refused_before_anything_is_loaded(loaded, run, images, tmp_path, target):
    (tmp_path / "folder").mkdir()
    assert_refused(run("--image_dir", images / "a.png", "--output", tmp_path / target), target.partition("/")[0])
    assert not loaded


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"seed": -1}, "'seed' is -1"),
        ({"sed": 1}, "did you mean 'seed'"),
        ({"model__image_token_len": 9}, "image_token_len is 9"),
        ({"processor__vocab_file": "none.tiktoken"}, "none.tiktoken: no such file"),
        ({"processor__vocab_file": "tiny.safetensors"}, "tiny.safetensors"),
        ({"model__language_model__vocab_size": 300}, "small.tiktoken: 264 tokens, expected 294"),
        ({"checkpoint": "none.safetensors"}, "none.safetensors: no such file"),
        ({"checkpoint": "small.tiktoken"}, "small.tiktoken"),
        ({"checkpoint": "cut.safetensors"}, "cut.safetensors"),
        ({"model__language_model__intermediate_size": 40}, "does not fit the vary_toy model"),
        ({"device": "ascend"}, "no Ascend NPU"),
    ],
)
def test_a_run_that_cannot_be_loaded(folder, run, images, tmp_path, monkeypatch, change, expected):
    from mindspore import device_context

    monkeypatch.setattr(device_context.ascend, "is_available", lambda: False)
    (folder / "cut.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes()[:-8])
    path = write_yaml(folder, tiny_config(**change), name="changed.yaml")
    output = tmp_path / "out.jsonl"
    assert_refused(run("--image_dir", images / "a.png", "--config_path", path, "--output", output), expected)
    assert not output.exists()


def test_yaml_errors(run, images, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [1\n")
    assert_refused(run("--image_dir", images / "a.png", "--config_path", bad), "not valid YAML at line 2")
    assert_refused(
        run("--image_dir", images / "a.png", "--config_path", tmp_path / "no.yaml"), "no.yaml does not exist"
    )
