"""YAML to typed configs: what is understood, and the one-line errors for the rest."""

import pytest

from mindvlm.core.config import GenerationConfig, build_config, kind_of_config, read_yaml, resolve_path
from mindvlm.core.errors import UserError
from mindvlm.models.run_config import find_family, read_config
from mindvlm.models.vary.config import parse_config
from tests.tiny_vary import tiny_config, write_yaml


def error_of(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tiny_config(**changes), path / "tiny.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_values(tmp_path):
    config = parse_config(tiny_config(seed=5), tmp_path / "tiny.yaml")
    assert (config.seed, config.dtype) == (5, "float32")
    assert config.model.language_model.rope_theta == 10000.0
    assert config.model.vision_select_layer == -2
    assert config.generation == GenerationConfig(max_new_tokens=8)
    assert config.processor.vocab_size == config.model.language_model.vocab_size


def test_a_retired_key_with_its_old_value_is_accepted_and_not_kept(tmp_path):
    config = parse_config(tiny_config(quant="none"), tmp_path / "tiny.yaml")
    assert config == parse_config(tiny_config(), tmp_path / "tiny.yaml") and not hasattr(config, "quant")


@pytest.mark.parametrize(
    "change, key, nearest",
    [
        ({"sed": 1}, "sed", "seed"),
        ({"model__max_lenght": 9}, "model.max_lenght", "max_length"),
        ({"model__language_model__hiden_size": 9}, "model.language_model.hiden_size", "hidden_size"),
        ({"processor__clip__resise": "crop"}, "processor.clip.resise", "resize"),
        ({"generation__max_tokens": 1}, "generation.max_tokens", "max_new_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, change, key, nearest):
    message = error_of(tmp_path, **change)
    assert f"unknown config key '{key}'" in message and f"did you mean '{nearest}'" in message


def test_an_unknown_key_unlike_any_lists_the_known_ones():
    with pytest.raises(UserError, match="known keys: do_sample, max_new_tokens, .*top_p"):
        build_config(GenerationConfig, {"zzz": 1}, "generation")


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("seed", "one", "a whole number"),
        ("seed", True, "a whole number"),
        ("seed", 1.0, "a whole number"),
        ("seed", None, "a whole number"),
        ("model__language_model__rms_norm_eps", "tiny", "a number"),
        ("model__language_model__rms_norm_eps", True, "a number"),
        ("model__language_model__qkv_bias", 1, "true or false"),
        ("model__vision_vocabulary__global_attn_indexes", 1, "a list"),
        ("model__vision_vocabulary__global_attn_indexes", ["a"], "a whole number"),
        ("processor__vocab_file", 3, "text"),
        ("generation__stop_strings", "###", "a list"),
        ("scope", "reads pages", "a mapping"),
        ("device", "gpu", "'auto' or 'cpu' or 'ascend'"),
        ("mode", "eager", "'graph' or 'pynative'"),
        ("dtype", "int8", "'float32' or 'float16' or 'bfloat16'"),
        ("quant", "int4", "'none'"),
        ("model", None, "a mapping"),
        ("model", [1], "a mapping"),
    ],
)
def test_a_wrong_type_names_key_value_and_expectation(tmp_path, key, value, expected):
    message = error_of(tmp_path, **{key: value})
    section = key.replace("__", ".")
    assert f"'{section}" in message and expected in message
    shown = value[0] if value == ["a"] else value
    assert repr(shown) in message


def test_a_key_is_named_with_its_file_unless_it_is_from_the_command_line(tmp_path):
    right, wrong = (write_yaml(tmp_path, tiny_config(**change), f"{len(change)}.yaml") for change in ({}, {"sed": 1}))
    other = write_yaml(tmp_path, tiny_config(family="blip"), "other.yaml")
    for path, overrides, said in (
        (wrong, {}, f"{wrong}: unknown config key 'sed'"),
        (wrong, {"device": "cpu"}, f"{wrong}: unknown config key 'sed'"),
        (wrong, {"device": "gpu"}, "config key 'device' is 'gpu'"),
        (right, {"device": "gpu"}, "config key 'device' is 'gpu'"),
        (other, {"device": "cpu"}, f"{other}: config key 'family' is 'blip'"),
    ):
        with pytest.raises(UserError, match=f"^{said}") as caught:
            read_config(path, overrides)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^{other}: config key 'family' is 'blip'"):
        find_family(other)


@pytest.mark.parametrize("questions", [[], ["What?", ""]])
def test_a_scope_without_questions(tmp_path, questions):
    said = f"config key 'scope.questions' is {questions!r}; expected one question or more, none empty"
    assert error_of(tmp_path, scope={"questions": questions}) == said


def test_a_number_without_a_dot_is_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text("temperature: 1e-3\ntop_p: 1\n")
    config = build_config(GenerationConfig, read_yaml(tmp_path / "a.yaml"), "generation")
    assert config.temperature == 0.001 and config.top_p == 1.0 and isinstance(config.top_p, float)


def test_a_missing_key_is_named_with_its_section(tmp_path):
    config = tiny_config()
    del config["model"]["language_model"]["vocab_size"]
    with pytest.raises(UserError, match="'model.language_model' lacks the key 'vocab_size'"):
        parse_config(config, tmp_path / "tiny.yaml")
    del config["processor"]
    del config["model"]
    with pytest.raises(UserError, match="'top level' lacks the key 'model'"):
        parse_config(config, tmp_path / "tiny.yaml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"not valid YAML at line 3"),
        ("a: 1\n\tb: 2\n", r"not valid YAML at line 2"),
        ("- a\n", "holds no mapping"),
        ("", "holds no mapping"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML at line 1"),
    ],
)
def test_bad_yaml(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_yaml(tmp_path):
    with pytest.raises(UserError, match="none.yaml does not exist; check the path, nothing is downloaded"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder; give a YAML file"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="binary.yaml is no text; give a YAML file, or the folder of a checkpoint"):
        read_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_content(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("seed: 3\r\nname: 页\r\n", encoding=encoding)
    assert read_yaml(tmp_path / "a.yaml") == {"seed": 3, "name": "页"}


def test_a_relative_path_is_beside_the_file_first(tmp_path, monkeypatch):
    beside, working = tmp_path / "configs", tmp_path / "here"
    beside.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)
    (working / "weights").touch()
    assert resolve_path("weights", beside / "a.yaml") == str(working / "weights")
    (beside / "weights").touch()
    assert resolve_path("weights", beside / "a.yaml") == str(beside / "weights")
    assert resolve_path("absent", beside / "a.yaml") == str(beside / "absent")
    assert resolve_path(str(working / "weights"), beside / "a.yaml") == str(working / "weights")
    assert resolve_path(None, beside / "a.yaml") is None


LM, VIT, SAM = "model__language_model__", "model__vision_tower__", "model__vision_vocabulary__"


@pytest.mark.parametrize(
    "change, expected",
    [
        ({VIT + "num_attention_heads": 3}, "vision_tower: width 16 is not a multiple of 3"),
        ({SAM + "num_heads": 5}, "vision_vocabulary: width 12 is not a multiple of 5"),
        ({LM + "head_dim": 15}, "head_dim is 15"),
        ({LM + "hidden_size": 33}, "hidden_size is 33; expected an even number"),
        ({LM + "num_hidden_layers": 0}, "num_hidden_layers is 0; expected at least 1"),
        ({LM + "num_key_value_heads": 0}, "num_key_value_heads is 0; expected at least 1"),
        ({LM + "num_attention_heads": 0}, "num_attention_heads is 0; expected at least 1"),
        ({LM + "vocab_size": 2**31}, "vocab_size is 2147483648; expected at least 1, at most 2147483647"),
        ({LM + "partial_rotary_factor": 1e308}, "partial_rotary_factor 1e+308"),
        ({VIT + "patch_size": 0}, "patch_size is 0; expected at least 1"),
        ({SAM + "num_heads": 0}, "num_heads is 0; expected at least 1"),
        ({LM + "rope_theta": 0}, "rope_theta is 0.0"),
        ({LM + "rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({VIT + "hidden_act": "tanh"}, "hidden_act is 'tanh'; expected one of gelu, quick_gelu"),
        ({"model__vision_select_layer": -4}, "vision_select_layer is -4; the tower has 2 layers"),
        ({"model__vision_select_layer": 3}, "expected -3..2"),
        ({SAM + "global_attn_indexes": [2]}, "names block 2; expected 0..1"),
        ({SAM + "window_size": -1}, "window_size is -1"),
        ({SAM + "image_size": [32]}, "image_size is"),
        ({VIT + "image_size": 4}, "image_size is 4"),
        ({"model__max_length": 0}, "max_length is 0"),
        ({"model__max_length": 32768}, "max_length is 32768; LogN"),
        ({"processor__num_image_tokens": 9}, "num_image_tokens is 9 but model.image_token_len is 8"),
        (
            {"model__image_token_len": 9, "processor__num_image_tokens": 9},
            "image_token_len is 9 but both towers output 8",
        ),
        ({VIT + "patch_size": 16}, "vision_tower outputs 2 tokens per image but model.vision_vocabulary 8"),
        ({"processor__vocab_size": 9}, "processor.vocab_size is 9 but model.language_model.vocab_size is 270"),
        ({"processor__clip": {"size": 16, "resize": "crop"}}, "processor.clip.size is 16 but model.vision_tower"),
        ({"processor__high": {"size": 64, "resize": "squash"}}, "processor.high.size is 64 but model.vision_vocab"),
        ({"processor__high": {"size": 64, "resize": "keep"}}, "processor.high.resize is 'keep'"),
        ({"processor__clip": {"size": 16, "resize": "zoom"}}, "'zoom'"),
        ({"generation__max_new_tokens": 0}, "generation.max_new_tokens is 0; expected at least 1"),
        ({"generation__temperature": 0}, "generation.temperature is 0.0"),
        ({"generation__top_k": -1}, "generation.top_k is -1"),
        ({"generation__top_p": 1.5}, "generation.top_p is 1.5"),
        ({"generation__repetition_penalty": 0}, "generation.repetition_penalty is 0.0"),
        ({"generation__max_repeated_tokens": 3}, "generation.max_repeated_tokens is 3; expected 0 (off) or at least 4"),
        ({"generation__no_repeat_ngram_size": -1}, "generation.no_repeat_ngram_size is -1"),
        ({"generation__stop_strings": [""]}, "generation.stop_strings is ['']"),
    ],
)
def test_an_impossible_combination(tmp_path, change, expected):
    assert expected in error_of(tmp_path, **change)


def test_a_grid_that_is_no_multiple_of_four_is_rounded_up(tmp_path):
    # 7 x 13 patches -> 4 x 7 -> 2 x 4
    change = {"model__vision_vocabulary__image_size": [28, 52], "processor__high__size": [28, 52]}
    assert parse_config(tiny_config(**change), tmp_path / "tiny.yaml").model.image_token_len == 8


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model_config: a.yaml\ndata: {}\n", "a training job"),
        ("base: a.yaml\n", "a training job"),
        ("model: {}\nprocessor: {}\n", "the config of a model"),
        ('{"model_type": "llama"}', "the config.json of a checkpoint"),
        ("a: {annotations: a.json}\nb: {annotations: b.json}\n", "a registry of data sets"),
        ("a: 1\n", ""),
    ],
)
def test_what_a_file_configures(tmp_path, text, kind):
    (tmp_path / "a.yaml").write_text(text)
    assert kind_of_config(read_yaml(tmp_path / "a.yaml")) == kind
