"""Adapters are opened from every form that peft has written, and what cannot be merged is refused in one line."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mindvlm.core.errors import UserError
from mindvlm.weights.lora.adapter import open_adapter
from mindvlm.weights.lora.config import read_adapter_config
from mindvlm.weights.rules.findings import ConversionError
from tests.weights.lora.adapters import PREFIX, write_adapter

PAIR = {"m.lora_A.weight": torch.ones(2, 5), "m.lora_B.weight": torch.ones(6, 2)}
EMBEDDING = {"e.lora_embedding_A": torch.ones(2, 7), "e.lora_embedding_B": torch.ones(4, 2)}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", "other.safetensors"])
def test_folder_file_or_config(tmp_path, weights):
    folder = write_adapter(tmp_path / "a", {**PAIR, **EMBEDDING}, weights=weights)
    names = [folder / weights, *([folder, folder / "adapter_config.json"] if weights.startswith("adapter") else [])]
    for name in names:
        with open_adapter(name) as adapter:
            assert set(adapter.targets) == {"m.weight", "e.weight"}
            assert adapter.path == folder
            assert adapter.files == (folder / weights, folder / "adapter_config.json")
            assert adapter.low_rank["m.weight"].scaling == 2
            assert adapter.low_rank["e.weight"].is_embedding and not adapter.low_rank["m.weight"].is_embedding


def test_nothing_was_trained_whole(tmp_path):
    folder = write_adapter(tmp_path, {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(3, 2)})
    torch.save({}, folder / "non_lora_trainables.bin")
    with open_adapter(folder) as adapter:
        assert adapter.trained_whole == () and set(adapter.targets) == {"a.weight"}
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.bin: holds no tensors; it was saved without weights"):
        open_adapter(folder)


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", [PREFIX, "", "module.", f"module.{PREFIX}", f"_orig_mod.{PREFIX}"])
def test_what_the_llava_programs_trained_whole(tmp_path, prefix, ending):
    """A separate file beside the adapter holds it."""
    folder = write_adapter(tmp_path / "a", PAIR, weights="adapter_model.bin")
    second = folder / f"non_lora_trainables{ending}"
    (torch.save if ending == ".bin" else save_file)({f"{prefix}c.weight": torch.full((3,), 7.0)}, second)
    with open_adapter(folder) as adapter:
        (whole,) = adapter.trained_whole
        assert set(adapter.targets) == {"m.weight"} and set(whole.targets) == {"c.weight"}
        assert whole.checkpoint.read(whole.replaced["c.weight"]).data.tolist() == [7.0] * 3
        assert [file.name for file in adapter.files] == ["adapter_model.bin", second.name, "adapter_config.json"]


@pytest.mark.parametrize(
    ("tensors", "detail"),
    [
        ({"c.weight": torch.ones(3, dtype=torch.int32)}, "int32, expected a floating-point type"),
        (PAIR, "a factor of an adapter"),
        ({"c.weight": torch.ones(3), "module.c.weight": torch.ones(3)}, "another key has the same meaning"),
    ],
)
def test_errors_in_the_second_file_name_it(tmp_path, tensors, detail):
    folder = write_adapter(tmp_path / "a", PAIR)
    torch.save(tensors, folder / "non_lora_trainables.bin")
    with pytest.raises(ConversionError, match=f"non_lora_trainables.bin does not hold parts .*{detail}"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("head.weight", "head.weight"),
        ("head.modules_to_save.weight", "head.weight"),
        ("head.modules_to_save.default.weight", "head.weight"),
        ("head.modules_to_save.default.0.weight", "head.0.weight"),
        ("h.0.q.base_layer.bias", "h.0.q.bias"),
    ],
)
def test_keys_of_replacements(tmp_path, key, target):
    with open_adapter(write_adapter(tmp_path, {key: torch.ones(3)})) as adapter:
        assert adapter.replaced == {target: PREFIX + key}


@pytest.mark.parametrize("name", ["default", "ocr", "weight"])
def test_keys_with_the_name_of_the_adapter(tmp_path, name):
    older = {
        f"m.lora_A.{name}.weight": torch.ones(2, 5),
        f"m.lora_B.{name}.weight": torch.ones(6, 2),
        f"m.lora_B.{name}.bias": torch.ones(6),
        f"e.lora_embedding_A.{name}": torch.ones(2, 7),
        f"e.lora_embedding_B.{name}": torch.ones(4, 2),
        f"head.modules_to_save.{name}.0.weight": torch.ones(3),
    }
    with open_adapter(write_adapter(tmp_path, older)) as adapter:
        assert set(adapter.low_rank) == {"m.weight", "e.weight"} and set(adapter.shifts) == {"m.bias"}
        assert set(adapter.replaced) == {"head.0.weight"}


def test_keys_of_two_adapters(tmp_path):
    second = {key.replace(".weight", ".other.weight"): tensor for key, tensor in PAIR.items()}
    first = {
        f"n.{key.replace('.weight', '.ocr.weight')}": tensor
        for key, tensor in [
            *PAIR.items(),
            ("k.lora_A.weight", PAIR["m.lora_A.weight"]),
            ("k.lora_B.weight", PAIR["m.lora_B.weight"]),
        ]
    }
    folder = write_adapter(tmp_path, first | second)
    with pytest.raises(ConversionError, match="of another adapter than 'ocr'"):
        open_adapter(folder)


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", ""])
def test_keys_inside_a_wrapper(tmp_path, start):
    folder = write_adapter(tmp_path, PAIR)
    save_file({f"{start}{PREFIX}{key}": tensor for key, tensor in PAIR.items()}, folder / "adapter_model.safetensors")
    with open_adapter(folder) as adapter:
        assert set(adapter.low_rank) == {"m.weight"}


def test_keys_with_words_of_wrappers_inside(tmp_path):
    pair = {f"h.0._orig_mod.{key}": tensor for key, tensor in PAIR.items()}
    with open_adapter(write_adapter(tmp_path, pair)) as adapter:
        assert set(adapter.low_rank) == {"h.0.m.weight"}


def test_the_parent_folder_of_one_named_adapter(tmp_path):
    """As peft's save_pretrained writes an adapter that is not called `default`."""
    write_adapter(tmp_path / "ocr", PAIR)
    torch.save({"c.weight": torch.ones(3)}, tmp_path / "non_lora_trainables.bin")
    with open_adapter(tmp_path) as adapter:
        assert adapter.path == tmp_path / "ocr" and set(adapter.trained_whole[0].targets) == {"c.weight"}
    write_adapter(tmp_path / "tables", PAIR)
    with pytest.raises(UserError, match="holds 2 adapters, in ocr, tables; give the folder of one of them"):
        open_adapter(tmp_path)


def findings(folder):
    with pytest.raises(ConversionError) as caught:
        open_adapter(folder)
    assert "\n" not in str(caught.value)
    return [(finding.status, finding.name.removeprefix(PREFIX)) for finding in caught.value.findings]


@pytest.mark.parametrize("name", [*PAIR, *EMBEDDING])
def test_a_factor_without_its_partner(tmp_path, name):
    rest = {key: tensor for key, tensor in {**PAIR, **EMBEDDING}.items() if key != name}
    assert findings(write_adapter(tmp_path, rest)) == [("missing", name)]


@pytest.mark.parametrize(
    "key",
    [
        "m.lora_magnitude_vector",
        "m.lora_diag.weight",
        "m.lora_A.other.weight",
        "lora_A.weight",
        "m.lora_A.bias",
        "e.token_adapter.trainable_tokens_delta",
        "head.original_module.weight",
    ],
)
def test_keys_of_other_kinds(tmp_path, key):
    assert findings(write_adapter(tmp_path, {**PAIR, key: torch.ones(2)})) == [("unexpected", key)]


def test_keys_without_the_prefix(tmp_path):
    folder = write_adapter(tmp_path, PAIR)
    torch.save({"m.lora_A.weight": torch.ones(2, 5)}, folder / "x.bin")
    with pytest.raises(ConversionError, match="start with base_model.model."):
        open_adapter(folder / "x.bin")


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"m.lora_A.default.weight": torch.ones(2, 5)}, "m.lora_A.default.weight"),
        ({"m.lora_embedding_A": torch.ones(2, 5), "m.lora_embedding_B": torch.ones(6, 2)}, "m.lora_embedding_A"),
        ({"h.weight": torch.ones(1), "h.modules_to_save.weight": torch.ones(1)}, "h.weight"),
    ],
)
def test_keys_that_say_the_same(tmp_path, extra, name):
    found = findings(write_adapter(tmp_path, {**PAIR, **extra}))
    assert [status for status, _ in found] == ["duplicate"]
    assert found[0][1] in {name, *extra, *PAIR}


@pytest.mark.parametrize(
    ("a", "b"), [((3, 5), (6, 2)), ((3, 5), (6, 3)), ((5, 2), (2, 6)), ((2,), (6, 2)), ((2, 5), ()), ((0, 5), (6, 0))]
)
def test_factors_that_do_not_fit(tmp_path, a, b):
    tensors = {"m.lora_A.weight": torch.ones(a), "m.lora_B.weight": torch.ones(b)}
    assert findings(write_adapter(tmp_path, tensors)) == [("shape", "m.lora_A.weight")]


def test_factors_of_whole_numbers(tmp_path):
    tensors = {**PAIR, "m.lora_A.weight": torch.ones(2, 5, dtype=torch.int8)}
    assert findings(write_adapter(tmp_path, tensors)) == [("dtype", "m.lora_A.weight")]


def test_a_module_that_should_be_saved_and_is_not(tmp_path):
    assert findings(write_adapter(tmp_path, PAIR, modules_to_save=["head"])) == [("missing", "head")]


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"use_dora": True},
        {"use_qalora": True},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"some_future_variant": {"on": True}},
        {"variant": "a\nb" * 1000},
        {"variant": 10**400},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": ["olora"]},
        {"bias": "some"},
        {"r": 0},
        {"r": "8"},
        {"r": 2.0},
        {"r": True},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": "16"},
        {"use_rslora": "yes"},
        {"fan_in_fan_out": 1},
        {"modules_to_save": "head"},
        {"target_modules": {"q": 1}},
        {"rank_pattern": ["q"]},
        {"rank_pattern": {"q": -1}},
        {"alpha_pattern": {"q": "x"}},
        {"rank_pattern": {"(a+)+b": 3}},
        {"rank_pattern": {"q(": 3}},
        {"alpha_pattern": {".*.*.*.*x": 3}},
        {"alpha_pattern": {"q" * 1000: 3}},
    ],
)
def test_settings_that_are_refused(tmp_path, setting):
    folder = write_adapter(tmp_path, PAIR, **setting)
    with pytest.raises(UserError) as caught:
        open_adapter(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "adapter_config.json")) and "\n" not in message and len(message) < 400
    assert next(iter(setting)) in message and "None" not in message and "True" not in message


def test_an_unknown_setting_whose_name_is_no_word(tmp_path):
    with pytest.raises(UserError, match=r"'line\\nline.*\.\.\. is 1, which cannot be merged") as caught:
        open_adapter(write_adapter(tmp_path, PAIR, **{"line\n" * 1000: 1}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_settings_that_change_nothing(tmp_path):
    """The config of a plain adapter of peft 0.21."""
    folder = write_adapter(
        tmp_path,
        PAIR,
        alora_invocation_tokens=None,
        auto_mapping={"base_model_class": "GPT2LMHeadModel", "parent_library": "transformers"},
        base_model_name_or_path="some/model",
        init_lora_weights="gaussian",
        inference_mode=True,
        layer_replication=None,
        loftq_config={},
        lora_dropout=0.1,
        megatron_core="megatron.core",
        peft_version="0.21.2",
        qalora_group_size=16,
        task_type="CAUSAL_LM",
        use_dora=False,
    )
    with open_adapter(folder) as adapter:
        assert adapter.config.scaling_of("m") == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100000, "\x00", '{"peft_type": "LORA"}', " " * (1 << 21)]
)
def test_damaged_configs(tmp_path, text):
    folder = write_adapter(tmp_path, PAIR)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        open_adapter(folder)
    assert "\n" not in str(caught.value)


SETTINGS = st.sampled_from(["r", "lora_alpha", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.dictionaries(SETTINGS, VALUES))
def test_random_settings_are_read_or_refused(tmp_path_factory, settings_read):
    path = tmp_path_factory.mktemp("config") / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings_read}))
    try:
        config = read_adapter_config(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config.scaling_of("model.layers.0.q_proj"), float)


def test_what_is_not_there(tmp_path):
    folder = write_adapter(tmp_path / "a", PAIR)
    with pytest.raises(UserError, match="no such file or folder; give the folder of a PEFT adapter"):
        open_adapter(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected adapter_model.safetensors or adapter_model.bin"):
        open_adapter(tmp_path / "empty")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="needs it beside its weights"):
        open_adapter(folder)
