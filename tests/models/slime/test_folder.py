"""A folder of a SliME answers, and what cannot be asked is one line."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

import mindvlm
from mindvlm.convert.convert_weight import main as convert
from mindvlm.core.errors import UserError
from mindvlm.models.run_config import read_config
from mindvlm.models.slime.positions import sine_table
from tests.models.tinyllava.test_separate_tower import assert_tower, edit_config, parameters, write_tower
from tests.tiny_slime import CONFIG, TOWER, hf_tensors, write_tiny_slime

WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 170, 3), np.uint8))
SQUARE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8))
QUESTION = "What is on the table?"
PROJECTOR, SAMPLER = "model.mm_projector.", "model.sampler.post_qformer."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_slime(tmp_path_factory.mktemp("slime"))


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    return write_tiny_slime(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def model(folder):
    return mindvlm.load(folder, device="cpu", mode="pynative", cache=False)


def count_rows(model, query, picture):
    picture = model.processor.picture(picture)
    ids, features = model.prepared(model.prompter(query, 1), [picture])
    assert ids.count(model.engine.placeholder_id) == features.counts[0] == len(features.rows)
    return features.counts[0], len(picture.layout)


def test_the_router_leaves_rows_out(model):
    number, most = count_rows(model, QUESTION, WIDE)
    assert 17 < number < most == 17 + 3 * 4


def test_rows_depend_on_the_question_but_views_are_encoded_once(model):
    model.encoder.cache.clear()
    runs = []
    encode = model.engine.encode_images
    model.engine.encode_images = lambda *pixels: runs.append(pixels[0].shape) or encode(*pixels)
    try:
        picture = model.processor.picture(WIDE)
        kept = []
        for query in ("The sky", "bus " * 12, "What colour is the red cup?"):
            ids, features = model.prepared(model.prompter(query, 1), [picture])
            kept.append(features.rows.asnumpy())
    finally:
        model.engine.encode_images = encode
    assert runs == [(1, 3, 56, 56), (1, 2, 3, 56, 56), (1, 2, 3, 56, 56)]
    assert len({array.tobytes() for array in kept}) > 1
    for array in kept:
        np.testing.assert_array_equal(array[:17], kept[0][:17])


def test_an_answer_is_the_same_alone_and_in_a_batch(model):
    single = [model.chat(QUESTION, images=image, max_new_tokens=6).ids for image in (WIDE, SQUARE)]
    text_only = model.chat(QUESTION, max_new_tokens=6).ids
    batch = model.generate([QUESTION] * 3, images=[WIDE, SQUARE, None], max_new_tokens=6)
    assert [answer.ids for answer in batch] == [*single, text_only]
    assert model.chat(f"<image>\n{QUESTION}", images=WIDE, max_new_tokens=6).ids == single[0]
    assert model.chat(f"<image-placeholder>\n{QUESTION}", images=WIDE, max_new_tokens=6).ids == single[0]


def test_a_conversation_routes_again_for_each_question(model):
    talk, history = mindvlm.Conversation(model), []
    for query, image in ((QUESTION, WIDE), ("What colour is the bus?", None), ("<image> And this?", SQUARE)):
        images = [WIDE, SQUARE][: 2 if image is SQUARE else 1]
        alone = model.chat(query, images=images, history=history, max_new_tokens=5)
        answer = talk.ask(query, images=image, max_new_tokens=5)
        assert (answer.ids, answer.num_prompt_tokens) == (alone.ids, alone.num_prompt_tokens)
        history = answer.history
    assert len(talk.pictures) == len(talk.features.counts) == 2


def test_several_pictures_and_odd_sizes(model):
    answer = model.chat("<image> and <image>: what differs?", images=[WIDE, SQUARE], max_new_tokens=3)
    assert answer.num_new_tokens
    for size in ((1, 1), (1, 5000), (5000, 1)):
        assert model.chat("What?", images=Image.new("RGB", size, "red"), max_new_tokens=2).num_new_tokens


def test_a_question_longer_than_the_context_is_refused_before_anything_is_computed(model):
    model.encoder.cache.clear()
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens but the context holds 256"):
        model.chat("bus " * 200, images=WIDE)
    assert not model.encoder.cache


def test_a_question_is_not_cut_at_the_training_length(folder, model):
    assert json.loads((folder / "config.json").read_text())["tokenizer_model_max_length"] == 64
    answer = model.chat("bus " * 12, images=WIDE, max_new_tokens=2)
    assert answer.num_prompt_tokens > 64 and answer.num_new_tokens


@pytest.mark.parametrize(
    ("changes", "fixed"),
    [({"use_global_only": True}, 16), ({"use_local_only": True}, 0), ({"image_aspect_ratio": "pad"}, 16)],
)
def test_one_kind_of_view(tmp_path, changes, fixed):
    model = mindvlm.load(write_tiny_slime(tmp_path, **changes), device="cpu", mode="pynative", cache=False)
    number, most = count_rows(model, QUESTION, WIDE)
    assert (number == most == fixed) if fixed else 0 < number < most == 12
    assert model.chat(QUESTION, images=WIDE, max_new_tokens=2).num_new_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_resampler_topp": 1.5}, "mm_resampler_topp is 1.5, expected a number from 0 to 1"),
        ({"mm_resampler_temp": 0}, "mm_resampler_temp is 0, expected a number above 0"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu'; only 'gated' is supported"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'; only 'cosine' is supported"),
        ({"mm_hidden_size": 64}, "mm_hidden_size is 64 but the tower './vision_tower' has features of width 128"),
        ({"mm_learnable_gated": 2}, "mm_learnable_gated is 2; expected -1"),
        ({"mm_resampler_dim": 5}, "mm_resampler_dim is 5; expected a square number"),
        ({"mm_resampler_dim": 16}, "mm_resampler_dim is 16; expected 1 to 15"),
        ({"use_local_only": True, "use_global_only": True}, "use_global_only and use_local_only are both true"),
        ({"use_local_only": True, "image_aspect_ratio": "pad"}, "mode 'pad' cuts no crops"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_vision_tower": "unknown"}, "mm_vision_tower is 'unknown', which is not a known tower"),
        ({"seperator": None}, "lacks 'seperator'"),
        ({"seperator": 5000}, "seperator is 5000; expected 0 to 329"),
        ({"mm_projector_type": None, "mm_resampler_type": None}, "does not describe a SliME"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path, changes, message):
    folder = write_tiny_slime(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(UserError) as caught:
        read_config(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count(str(folder)) <= 1


def test_another_llava_of_the_same_type_is_refused(tmp_path):
    folder = write_tiny_slime(tmp_path, mm_projector_type="mlp2x_gelu", mm_resampler_type=None)
    with pytest.raises(UserError, match="config.json does not describe a SliME; give the folder of a SliME"):
        read_config(folder)


def test_a_projector_of_another_width_is_refused(tmp_path):
    folder = write_tiny_slime(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.mm_projector.projection.0.weight"] = np.zeros((40, 128), np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="projection.0.weight") as caught:
        mindvlm.load(folder, device="cpu", mode="pynative", cache=False)
    assert "correct the sizes in" in str(caught.value)


def test_a_separate_tower_replaces_that_of_the_checkpoint(tmp_path, folder):
    tower = write_tower(tmp_path / "clip", TOWER, whole=True)
    assert_tower(parameters(folder, vision_tower=tower, cache=False), tower, left_out=("embeddings.position_ids",))


def test_an_adapter_and_what_was_trained_beside_it_are_merged(tmp_path, folder):
    """As the original leaves it: without fixed positions and buffers, under the prefixes of PEFT."""
    rng, adapter, tensors = np.random.default_rng(3), tmp_path / "lora", hf_tensors()
    adapter.mkdir()
    factors, merged = {}, {}
    for layer in range(2):
        name = f"layers.{layer}.self_attn.v_proj"
        low, high = rng.normal(size=(4, 32)).astype(np.float32), rng.normal(size=(16, 4)).astype(np.float32)
        factors |= {f"base_model.model.model.{name}.lora_{which}.weight": v for which, v in (("A", low), ("B", high))}
        merged[f"language_model.{name}.weight"] = tensors[f"model.{name}.weight"] + 2 * high @ low
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    fixed = ("pos_embed", ".mean", ".std")
    trained = {n: -v for n, v in tensors.items() if n.startswith((PROJECTOR, SAMPLER)) and not n.endswith(fixed)}
    beside = {f"base_model.model.{name}": torch.tensor(value) for name, value in trained.items()}
    torch.save(beside, adapter / "non_lora_trainables.bin")
    values = parameters(folder, adapter=adapter, cache=False)
    for name, value in merged.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(values["sampler.query"], -tensors[f"{SAMPLER}query"])
    np.testing.assert_array_equal(values["mm_projector.attn.pos_embed"], tensors[f"{PROJECTOR}attn.pos_embed"])


def drop(folder, *endings):
    """Takes tensors out of the weights of a folder."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith(endings)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_absent_positions_are_computed(tmp_path):
    folder = write_tiny_slime(tmp_path)
    drop(folder, "pos_embed")
    values = parameters(folder, cache=False)
    for name, grid in (("mm_projector.attn.pos_embed", 4), ("sampler.pos_embed", 2)):
        np.testing.assert_array_equal(values[name], sine_table(128, grid).astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(values["sampler.query"], hf_tensors()[f"{SAMPLER}query"])


@pytest.mark.parametrize(
    ("prefix", "message"),
    [(SAMPLER, "holds no local compression; join it with the sampler.bin"), (PROJECTOR, "holds no connector")],
)
def test_an_absent_part_is_named(tmp_path, prefix, message):
    folder = write_tiny_slime(tmp_path)
    drop(folder, *(name for name in hf_tensors() if name.startswith(prefix)))
    with pytest.raises(UserError, match=message) as caught:
        mindvlm.load(folder, device="cpu", mode="pynative", cache=False)
    assert "\n" not in str(caught.value)


def test_files_of_earlier_stages_beside_the_shards_are_ignored(tmp_path, folder):
    """As published: shards with an index, and the two files that the stages leave."""
    model = tmp_path / "published"
    options = ["--torch_ckpt_path", str(folder), "--mindspore_ckpt_path", str(model), "--to", "hf"]
    assert convert([*options, "--max_shard_size", "100KB"]) == 0
    assert len(list(model.glob("model-*.safetensors"))) > 1
    (model / "vision_tower").mkdir(exist_ok=True)
    (model / "vision_tower" / "config.json").write_text(json.dumps(TOWER))
    tensors = {name: torch.zeros(value.shape) for name, value in hf_tensors().items()}
    for file, prefix in (("mm_projector.bin", PROJECTOR), ("sampler.bin", SAMPLER)):
        torch.save({name: value for name, value in tensors.items() if name.startswith(prefix)}, model / file)
    values = parameters(model, cache=False)
    np.testing.assert_array_equal(values["sampler.query"], hf_tensors()[f"{SAMPLER}query"])


KEYS = sorted({*CONFIG, "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act", "use_global_only", "vision_config"})
SCALARS = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(KEYS), value=VALUES)
def test_any_value_is_taken_or_refused(odd_folder, name, value):
    (odd_folder / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    try:
        read_config(odd_folder)
    except UserError as error:
        assert "\n" not in str(error)
