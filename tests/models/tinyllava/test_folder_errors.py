"""Whatever a config.json or a tokenizer's files hold, a folder is read or refused in one line that names the file."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.models.run_config import read_config
from tests.tiny_tinyllava import TOWER, hf_config, write_tiny_tinyllava

KEYS = [(), ("vision_config",)]
NAMES = sorted({*hf_config("llama"), *hf_config("phi"), *hf_config("stablelm"), "architectures", "rope_parameters"})
NAMES += ["mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type", "image_grid_pinpoints"]
SCALARS = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_tinyllava(tmp_path_factory.mktemp("folder"))


def refusal(folder, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_config(folder, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_is_taken_or_refused(folder, data):
    dialect = data.draw(st.sampled_from(["llama", "phi", "stablelm"]))
    config = hf_config(dialect)
    in_tower = data.draw(st.booleans())
    name = data.draw(st.sampled_from(sorted(TOWER) if in_tower else NAMES))
    value = data.draw(VALUES)
    config = {**config, "vision_config": {**TOWER, name: value}} if in_tower else {**config, name: value}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read_config(folder)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": "big"}, "hidden_size is 'big', expected a whole number"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000, expected a whole number from 1 to 1000"),
        ({"rope_theta": "x"}, "rope_theta is"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is"),
        ({"architectures": 5}, "architectures is 5, expected a list of texts"),
        ({"mm_vision_tower": 5}, "mm_vision_tower is 5, expected a text"),
        ({"mm_vision_tower": "x" * 5000, "vision_config": None}, "mm_vision_tower is 'xxx"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number"),
        ({"mm_projector_type": ["linear"]}, "mm_projector_type is a list, expected a text"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer is"),
        ({"pad_token_id": [0]}, "pad_token_id is a list, expected a whole number"),
        ({"tokenizer_model_max_length": "x"}, "tokenizer_model_max_length is"),
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio is a list, expected a text"),
        ({"vision_config": {**TOWER, "patch_size": 0}}, "vision_config.patch_size is 0, expected a whole number"),
        ({"vision_config": {**TOWER, "num_hidden_layers": "4"}}, "vision_config.num_hidden_layers is"),
        ({"vision_config": "x"}, "vision_config is"),
    ],
)
def test_a_wrong_value_is_named(folder, changes, expected):
    (folder / "config.json").write_text(json.dumps({**hf_config("llama"), **changes}))
    message = refusal(folder)
    assert message.startswith(f"{folder}/config.json") and expected in message


@pytest.mark.parametrize(
    "config", [{"model_type": "llava"}, {"model_type": "tinyllava", "text_config": {"model_type": "llama"}}]
)
def test_a_part_that_is_missing_is_named(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    assert "lacks '" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": ["a"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 7}}}),
        ("tokenizer_config.json", {"additional_special_tokens": 5}),
        ("added_tokens.json", {"<x>": "y"}),
        ("added_tokens.json", {"<x>": None}),
        ("tokenizer.json", {"model": {"byte_fallback": True, "vocab": {}}, "added_tokens": [1]}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}}, "added_tokens": 3}),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path, name, content):
    folder = write_tiny_tinyllava(tmp_path)
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    (folder / name).write_text(json.dumps(content))
    assert f"{folder / name}: " in refusal(folder)


def test_a_tower_that_was_taken_for_the_published_one(tmp_path):
    folder = write_tiny_tinyllava(tmp_path, mm_vision_tower="bczhou/TinyLLaVA-1.5B-SigLIP")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tower bczhou/.* published one; .* as vision_config.json, or give its folder"):
        mindvlm.load(folder)
    (folder / "vision_config.json").write_text(json.dumps(TOWER | {"hidden_size": 20}))
    with pytest.raises(UserError, match="correct the sizes"):
        mindvlm.load(folder)


@pytest.mark.parametrize(("tower", "expected"), [("nowhere", "no such file or folder"), ("a.bin", "is not a folder")])
def test_a_tower_that_is_none(tmp_path, tower, expected):
    (tmp_path / "a.bin").write_bytes(b"")
    message = refusal(write_tiny_tinyllava(tmp_path), vision_tower=tmp_path / tower)
    assert f"{tmp_path / tower}: {expected}" in message


@pytest.mark.parametrize(("key", "value"), [("device", "cuda"), ("dtype", "int8"), ("seed", "x"), ("mode", 3)])
def test_an_override_of_another_kind(tmp_path, key, value):
    assert f"'{key}'" in refusal(write_tiny_tinyllava(tmp_path), **{key: value})
