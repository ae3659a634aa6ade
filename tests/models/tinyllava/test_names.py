"""Checkpoints of TinyLLaVA in every layout: which names they have, what is dropped, and the way back."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindvlm.checkpoint import MemorySource, TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.names import KINDS
from mindvlm.weights.opened import open_native
from mindvlm.weights.recognise import detect_model, native_view
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.planning import make_plan
from tests.hf_shapes import tinyllava_shapes, tower_shapes
from tests.known_models import ALL, MODELS, TINYLLAVA

TOWERS = {
    "siglip": {"model_type": "siglip_vision_model", "num_hidden_layers": 3},
    "clip": {"model_type": "clip_vision_model", "num_hidden_layers": 2},
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 30, "patch_size": 14}
NAMES = {"phi": "tinyllava_phi", "stablelm": "tinyllava_stablelm", "llama": "tinyllava_llama"}
TYPES = {"phi": "tiny_llava_phi", "stablelm": "tiny_llava_stablelm", "llama": "tiny_llava"}


def config_of(dialect: str, *, tower: str | None = "siglip", connector: str = "mlp2x_gelu", **more) -> dict:
    config = {
        "model_type": TYPES[dialect],
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if dialect == "llama" else 4,
        "vocab_size": 50,
        "use_qkv_bias": True,
        "mm_projector_type": connector,
        "resampler_hidden_size": 24,
        "num_queries": 5,
        "num_resampler_layers": 2,
        **more,
    }
    return config | ({"vision_config": {**SIZES, **TOWERS[tower]}} if tower else {})


def random_tensors(shapes: dict) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def bench_tensors(dialect: str, **options) -> dict[str, np.ndarray]:
    """A checkpoint with TinyLLaVABench's names."""
    return random_tensors(tinyllava_shapes(config_of(dialect, **options), dialect))


def factory_names(tensors: dict) -> dict[str, np.ndarray]:
    """The names of TinyLLaVA Factory, as its own conversion program makes them."""
    moved = {}
    for name, value in tensors.items():
        if name.startswith("model.vision_tower.vision_tower."):
            name = name.replace("model.vision_tower.vision_tower.", "vision_tower._vision_tower.")
        elif name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector.", "connector._connector.")
        else:
            name = f"language_model.{name}"
        moved[name] = value
    return moved


def legacy_names(tensors: dict) -> dict[str, np.ndarray]:
    """The names of transformers' llava."""
    moved = {}
    for name, value in tensors.items():
        name = name.replace("model.vision_tower.vision_tower.", "vision_tower.")
        name = name.replace("model.mm_projector.0.", "multi_modal_projector.linear_1.")
        name = name.replace("model.mm_projector.2.", "multi_modal_projector.linear_2.")
        if not name.startswith(("vision_tower.", "multi_modal_projector.")):
            name = f"language_model.{name}"
        moved[name] = value
    return moved


def read_all(source) -> dict[str, np.ndarray]:
    return {name: source.read(name).data for name in source.infos}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


def view(tensors: dict, **options):
    return native_view(MemorySource(tensors), TINYLLAVA, **options)


@pytest.mark.parametrize("dialect", NAMES)
@pytest.mark.parametrize("tower", [*TOWERS, None])
@pytest.mark.parametrize("connector", ["linear", "mlp1x_gelu", "mlp3x_gelu", "resampler", "identity"])
def test_every_combination_and_back(dialect, tower, connector):
    tensors = bench_tensors(dialect, tower=tower, connector=connector)
    found = detect_model(ALL, MemorySource(tensors).infos, folder_config={"model_type": TYPES[dialect]})
    assert found.name == NAMES[dialect]
    native = view(tensors)
    assert all(name.split(".")[0] in ("language_model", "vision_tower", "mm_projector") for name in native.infos)
    back = make_plan(native.plan.table.reverse(), native.infos).view(native)
    assert_equal(read_all(back), tensors)
    again = view(read_all(native))
    assert again.plan.is_identity


def test_a_stablelm_without_biases_and_back():
    tensors = bench_tensors("stablelm", use_qkv_bias=False)
    assert not any("q_proj.bias" in name and "vision" not in name for name in tensors)
    native = view(tensors)
    assert not native.plan.absent_parts
    assert_equal(read_all(make_plan(native.plan.table.reverse(), native.infos).view(native)), tensors)
    assert detect_model(ALL, MemorySource(tensors).infos).name == "tinyllava_stablelm"


def test_the_values_of_each_dialect_go_where_they_belong():
    native = read_all(view(tensors := bench_tensors("phi")))
    pairs = {
        "language_model.layers.1.self_attn.o_proj.bias": "model.layers.1.self_attn.dense.bias",
        "language_model.norm.weight": "model.final_layernorm.weight",
        "language_model.layers.0.mlp.fc2.weight": "model.layers.0.mlp.fc2.weight",
        "vision_tower.encoder.layers.1.mlp.fc1.bias": "model.vision_tower.vision_tower.vision_model.encoder.layers.1"
        ".mlp.fc1.bias",
        "mm_projector.2.weight": "model.mm_projector.2.weight",
    }
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(native[ours], tensors[theirs])


@pytest.mark.parametrize("dialect", NAMES)
def test_factory_and_bench_lead_to_the_same(dialect):
    tensors = bench_tensors(dialect)
    named = {"folder_config": {"architectures": ["TinyLlavaForConditionalGeneration"], "model_type": "tinyllava"}}
    assert detect_model(ALL, MemorySource(factory_names(tensors)).infos, **named).name == NAMES[dialect]
    factory = view(factory_names(tensors))
    assert factory.plan.table.name == "TinyLLaVA Factory"
    assert_equal(read_all(factory), read_all(view(tensors)))


def test_factory_keeps_the_bias_of_the_phi_head_and_bench_drops_it():
    tensors = bench_tensors("phi", head_bias=True)
    kept = view(factory_names(tensors))
    np.testing.assert_array_equal(kept.read("language_model.lm_head.bias").data, tensors["lm_head.bias"])
    dropped = view(tensors)
    assert "language_model.lm_head.bias" not in dropped.infos and list(dropped.plan.dropped) == ["lm_head.bias"]
    assert not dropped.plan.absent_parts and not kept.plan.absent_parts


def test_the_llava_layout():
    tensors = bench_tensors("llama", tower="clip")
    legacy = view(legacy_names(tensors))
    assert legacy.plan.table.name == "transformers llava"
    assert_equal(read_all(legacy), read_all(view(tensors)))
    back = make_plan(legacy.plan.table.reverse(), legacy.infos).view(legacy)
    assert_equal(read_all(back), legacy_names(tensors))


def test_a_siglip_as_google_publishes_it():
    """The text half, the pooling head and buffers are dropped; the last layer stays under its name."""
    tensors = random_tensors(tower_shapes({**SIZES, **TOWERS["siglip"]}, keeps_last_layer=True))
    extra = ("vision_model.head.probe", "vision_model.head.mlp.fc1.weight", "text_model.final_layer_norm.weight")
    extra += ("logit_scale", "logit_bias", "vision_model.embeddings.position_ids")
    native = view({**tensors, **{name: np.zeros(3, np.float32) for name in extra}})
    assert set(native.plan.dropped) == set(extra)
    assert {name.removeprefix("vision_tower.") for name in native.infos} == {
        name.removeprefix("vision_model.") for name in tensors
    }
    assert native.plan.absent_parts == ("language model", "connector") or "vision tower" not in native.plan.absent_parts


def test_the_row_that_ends_lines():
    tensors = bench_tensors("phi", mm_patch_merge_type="spatial_unpad")
    native = view(tensors)
    np.testing.assert_array_equal(native.read("image_newline").data, tensors["model.image_newline"])
    assert_equal(read_all(make_plan(native.plan.table.reverse(), native.infos).view(native)), tensors)
    assert view(read_all(native)).plan.is_identity


def test_a_connector_file_and_one_beside_an_adapter():
    tensors = {name: value for name, value in bench_tensors("phi").items() if "mm_projector" in name}
    native = view(tensors)
    assert list(native.infos) == [f"mm_projector.{layer}.{end}" for layer in (0, 2) for end in ("weight", "bias")]
    beside = {f"base_model.model.{name}": value for name, value in tensors.items()}
    assert_equal(read_all(view(beside)), read_all(native))


def test_a_vocabulary_is_cut_to_the_tokens():
    tensors = bench_tensors("llama")
    infos = {name: info for name, info in view(tensors).infos.items()}
    rows = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")
    wanted = {
        name: TensorInfo(name, info.dtype, (47, *info.shape[1:])) if name in rows else info
        for name, info in infos.items()
    }
    cut = view(tensors, target_infos=wanted)
    np.testing.assert_array_equal(cut.read(rows[0]).data, tensors["model.embed_tokens.weight"][:47])
    np.testing.assert_array_equal(cut.read(rows[1]).data, tensors["lm_head.weight"][:47])
    longer = wanted | {rows[0]: TensorInfo(rows[0], "float32", (51, 32))}
    with pytest.raises(ConversionError, match="does not fit"):
        view(tensors, target_infos=longer)
    narrower = wanted | {rows[0]: TensorInfo(rows[0], "float32", (47, 31))}
    with pytest.raises(ConversionError, match="does not fit"):
        view(tensors, target_infos=narrower)


@pytest.mark.parametrize("dialect", NAMES)
def test_a_folder_with_its_config(dialect, tmp_path):
    """The tower's sizes come from vision_config.json, from the folder that is named, or from the config itself."""
    config = config_of(dialect)
    tower = config.pop("vision_config")
    config["mm_vision_tower"] = "towers/some-siglip"
    save_file(bench_tensors(dialect), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "towers/some-siglip").mkdir(parents=True)
    (tmp_path / "towers/some-siglip/config.json").write_text(json.dumps(tower))
    with open_native([tmp_path], ALL) as opened:
        assert opened.model.name == NAMES[dialect] and "config.json" in opened.sizes
        assert not opened.absent_parts
    (tmp_path / "vision_config.json").write_text(json.dumps({**tower, "intermediate_size": 25}))
    with pytest.raises(ConversionError, match="does not fit"), open_native([tmp_path], ALL):
        pass
    (tmp_path / "vision_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(UserError, match="hidden_size is"), open_native([tmp_path], ALL):
        pass


def test_weights_without_a_config_are_checked_against_each_other():
    tensors = bench_tensors("llama")
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 33), np.float32)
    plan = view(tensors).plan
    with pytest.raises(ConversionError, match="does not fit together"):
        MODELS["tinyllava_llama"].require_consistent_sizes(plan)
    MODELS["tinyllava_llama"].require_consistent_sizes(view(bench_tensors("llama")).plan)


def test_what_is_missing_is_named():
    tensors = bench_tensors("stablelm")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    with pytest.raises(ConversionError) as error:
        view(tensors)
    assert "model.layers.1.self_attn.q_proj.bias" in str(error.value)


def test_every_kind_is_registered():
    assert [kind.name for kind in KINDS] == [name for name, model in MODELS.items() if model.family == "tinyllava"]


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("has_tower", [True, False])
def test_googles_siglip_over_a_model(tmp_path, has_config, has_tower):
    """It has one layer more than the model, which is left out; without a config.json the model's tower tells which."""
    tensors = bench_tensors("llama")
    if not has_tower:
        tensors = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps({**config_of("llama"), "mm_vision_tower": "siglip"}))
    save_file(tensors, tmp_path / "main.safetensors")
    tower = random_tensors(tower_shapes({**SIZES, **TOWERS["siglip"]}, keeps_last_layer=True))
    save_file({**tower, "logit_scale": np.zeros(1, np.float32)}, tmp_path / "siglip.safetensors")
    with open_native([tmp_path / "main.safetensors", tmp_path / "siglip.safetensors"], ALL) as opened:
        assert opened.model.name == "tinyllava_llama"
        values = read_all(opened.source)
        dropped = opened.inputs[1].plan.dropped
    last = "vision_model.encoder.layers.2."
    is_deleted = has_tower or has_config
    assert {name for name in dropped if name != "logit_scale"} == {
        n for n in tower if is_deleted and n.startswith(last)
    }
    expected = {n.replace("vision_model.", "vision_tower."): v for n, v in tower.items() if n not in dropped}
    assert_equal({name: value for name, value in values.items() if name.startswith("vision_tower.")}, expected)


@pytest.mark.parametrize(
    ("config", "naming"),
    [
        ({"model_type": "tinyllava", "text_config": {"model_type": "llama"}}, "TinyLLaVA Factory"),
        ({"model_type": "tiny_llava"}, "Hugging Face"),
    ],
)
def test_the_way_back_of_a_native_file_goes_with_its_config(tmp_path, config, naming):
    """A file of a training, without an entry about other names."""
    if "text_config" in config:
        config = {**config, "text_config": {**config_of("llama"), "model_type": "llama"}}
        config["vision_config"] = {**config_of("llama")["vision_config"], "num_hidden_layers": 2}
        config["connector_type"] = "mlp2x_gelu"
    else:
        config = {**config_of("llama"), **config}
    save_file(read_all(view(bench_tensors("llama"))), tmp_path / "native.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_native([tmp_path / "native.safetensors"], ALL) as opened:
        assert opened.naming == naming
        assert opened.way_back().table.name == f"{naming} (reversed)"


def test_the_way_back_of_a_head_with_a_bias_whose_file_does_not_say_its_names(tmp_path):
    """Only TinyLLaVA Factory has names for all of it."""
    factory = factory_names(bench_tensors("phi", head_bias=True))
    save_file(read_all(view(factory)), tmp_path / "native.safetensors")
    with open_native([tmp_path / "native.safetensors"], ALL) as opened:
        assert_equal(read_all(opened.way_back().view(opened.source)), factory)


def test_weights_of_another_decoder_are_compared_with_the_model_that_is_meant():
    """All native names of Llama's are StableLM-2's, too."""
    wanted = {name: info for name, info in view(bench_tensors("llama")).infos.items()}
    with pytest.raises(UserError, match="tinyllava_llama"):
        view(bench_tensors("phi"), target_infos=wanted)
