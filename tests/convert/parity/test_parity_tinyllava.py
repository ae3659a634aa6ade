"""The logits check of TinyLLaVA: right conversions of every layout pass, planted errors fail where they enter."""

import json

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.convert.convert_weight import main
from mindvlm.convert.parity.stages import STEP_LOGITS
from mindvlm.convert.parity.tinyllava import MODELS
from mindvlm.convert.parity.tinyllava.inputs import (
    TinyLlavaInputs,
    TinyLlavaScope,
    make_inputs,
    parity_config,
    scope_of,
)
from mindvlm.convert.random_weights import RandomSource
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.weights.recognise import native_view
from tests.convert.parity.parity_bench import NUM_TOKENS, Bench, request, swapped
from tests.hf_shapes import tinyllava_shapes, tower_shapes
from tests.known_models import TINYLLAVA
from tests.models.tinyllava.test_names import NAMES, config_of, factory_names, legacy_names, read_all

LANGUAGE = ["merged_embeddings", "layers", "logits", STEP_LOGITS]
TOWER = ["tower_features", "tower_last_hidden", "tower_pooled"]
LAYER = "language_model.layers.1."
TOWER_LAYER = "vision_tower.encoder.layers."
RESAMPLER = "mm_projector.resampler_blocks.0."


def source_tensors(config: dict, dialect: str) -> dict[str, np.ndarray]:
    """Random tensors under TinyLLaVABench's names."""
    return read_all(RandomSource(tinyllava_shapes(config, dialect), 0))


def native_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return read_all(native_view(MemorySource(tensors), TINYLLAVA))


def bench_of(folder, config: dict, dialect: str, tensors: dict[str, np.ndarray], **options) -> Bench:
    return Bench(folder, config, tensors, family="tinyllava", model=NAMES[dialect], **options)


COMBINATIONS = {"phi": ("siglip", "mlp2x_gelu"), "stablelm": ("siglip", "linear"), "llama": ("clip", "resampler")}


@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> dict[str, tuple[Bench, dict[str, np.ndarray]]]:
    """Each dialect with another tower or connector, and with square projections, so that more can be exchanged."""
    made = {}
    for dialect, (tower, connector) in COMBINATIONS.items():
        config = config_of(dialect, tower=tower, connector=connector, num_key_value_heads=4)
        tensors = source_tensors(config, dialect)
        bench = bench_of(tmp_path_factory.mktemp(dialect), config, dialect, tensors, compiled=True)
        made[dialect] = bench, native_tensors(tensors)
    return made


@pytest.mark.parametrize("dialect", NAMES)
def test_right_conversions_pass(benches, dialect):
    bench, native = benches[dialect]

    report = bench.report(native)

    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == list(MODELS[NAMES[dialect]])
    assert report.num_equal == len(report.tokens) == NUM_TOKENS


def test_a_connector_without_tensors(tmp_path):
    config = config_of("llama", tower="clip", connector="identity", hidden_size=16)
    tensors = source_tensors(config, "llama")
    report = bench_of(tmp_path, config, "llama", tensors).report(native_tensors(tensors))
    assert report.passed and "connector" in [stage.key for stage in report.stages]


def test_the_row_of_pictures_in_tiles_is_no_stage(tmp_path):
    config = config_of("llama", tower="clip", mm_patch_merge_type="spatial_unpad")
    tensors = source_tensors(config, "llama")
    native = native_tensors(tensors)
    assert "image_newline" in native
    assert bench_of(tmp_path, config, "llama", tensors).report(native).passed


def factory_config() -> dict:
    """The config.json of a TinyLLaVA Factory's Phi: its head has a bias, its SigLIP all layers."""
    config = config_of("phi")
    tower = config.pop("vision_config")
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "text_config": {**config, "model_type": "phi"},
        "vision_config": tower,
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
    }


def llava_config() -> dict:
    config = config_of("llama", tower="clip")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**config, "model_type": "llama"},
        "vision_config": config["vision_config"],
        "vision_feature_select_strategy": "full",
    }


@pytest.mark.parametrize(
    ("config", "dialect", "names"),
    [(factory_config(), "phi", factory_names), (llava_config(), "llama", legacy_names)],
    ids=["factory", "llava"],
)
def test_other_layouts_pass_and_are_read_under_their_own_names(tmp_path, config, dialect, names):
    tensors = names(source_tensors(config, dialect))
    native = native_tensors(tensors)
    bench = bench_of(tmp_path, config, dialect, tensors)

    assert bench.report(native).passed
    report = bench.report(swapped(native, "mm_projector.0.bias", "mm_projector.2.bias"))
    assert report.failed_stages[0].title == "connector"


@pytest.mark.parametrize(
    ("dialect", "first", "second", "title"),
    [
        ("phi", LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", "decoder layers"),
        ("phi", LAYER + "self_attn.o_proj.bias", LAYER + "mlp.fc2.bias", None),
        ("phi", LAYER + "input_layernorm.bias", "language_model.norm.bias", "decoder layers"),
        ("phi", LAYER + "self_attn.q_proj.bias", LAYER + "self_attn.v_proj.bias", "decoder layers"),
        ("stablelm", LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight", "decoder layers"),
        ("stablelm", LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight", "decoder layers"),
        ("llama", RESAMPLER + "to_k.weight", RESAMPLER + "to_v.weight", "connector"),
        ("phi", "mm_projector.0.bias", "mm_projector.2.bias", "connector"),
        ("llama", LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight", "decoder layers"),
        ("llama", LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight", "decoder layers"),
        ("llama", "language_model.embed_tokens.weight", "language_model.lm_head.weight", "merged embeddings"),
        ("llama", TOWER_LAYER + "1.layer_norm1.weight", TOWER_LAYER + "1.layer_norm2.weight", "vision last layer"),
        ("llama", TOWER_LAYER + "0.mlp.fc2.bias", TOWER_LAYER + "1.mlp.fc2.bias", "vision features"),
        ("llama", TOWER_LAYER + "1.layer_norm2.bias", "vision_tower.post_layernorm.bias", "vision last layer"),
        ("phi", TOWER_LAYER + "0.self_attn.q_proj.bias", TOWER_LAYER + "0.self_attn.v_proj.bias", "vision features"),
        ("phi", "vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias", "vision last norm"),
    ],
)  # fmt: skip
def test_planted_swaps_fail_where_they_enter(benches, dialect, first, second, title):
    bench, native = benches[dialect]

    report = bench.report(swapped(native, first, second))

    # the two biases of a parallel layer are added to each other: no output can tell them apart
    assert report.passed == (title is None)
    if title:
        assert report.failed_stages[0].title == title
        assert "is wrong, the stages before it are right" in report.failure()


@pytest.mark.parametrize("dialect", NAMES)
def test_every_tensor_counts(benches, dialect):
    """Only the key biases of an attention without rotary positions may change without any effect."""
    bench, native = benches[dialect]
    without_effect = []
    for name, value in native.items():
        noise = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)
        if bench.report(native | {name: value + 0.1 * noise}).passed:
            without_effect.append(name)
    assert without_effect == [f"{TOWER_LAYER}{layer}.self_attn.k_proj.bias" for layer in range(2)]


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [("vision_tower.", TOWER), ("mm_projector", ["connector"]), ("language_model.", LANGUAGE)],
)
def test_parts_are_compared_as_far_as_they_go(tmp_path, prefix, keys):
    config = config_of("stablelm")
    native = {
        name: value
        for name, value in native_tensors(source_tensors(config, "stablelm")).items()
        if name.startswith(prefix)
    }

    report = bench_of(tmp_path, config, "stablelm", native).report(native)

    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == keys


@pytest.mark.parametrize("keeps_last_layer", [True, False])
def test_a_siglip_of_its_own(tmp_path, keeps_last_layer):
    tower = config_of("phi")["vision_config"]
    shapes = tower_shapes(tower, keeps_last_layer=keeps_last_layer)
    tensors = read_all(RandomSource(shapes, 0))

    report = bench_of(tmp_path, tower, "phi", tensors).report(native_tensors(tensors))

    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == TOWER


def test_a_part_that_the_config_does_not_describe():
    config = from_hf_config(config_of("llama", tower=None))
    with pytest.raises(UserError, match="does not describe their vision_tower"):
        scope_of(["language_model.norm.weight", "vision_tower.post_layernorm.weight"], config)


def inputs_of(seed: int, *, image: bool) -> TinyLlavaInputs:
    wanted = request("", "", config_of("llama", tower="clip"), family="tinyllava", model="tinyllava_llama", seed=seed)
    return make_inputs(parity_config(wanted, ()), TinyLlavaScope(*[image] * 4), wanted)


def test_inputs_are_seeded_and_fit_the_config():
    inputs, again = inputs_of(5, image=True), inputs_of(5, image=True)
    np.testing.assert_array_equal(inputs.pixels, again.pixels)
    assert not np.array_equal(inputs.pixels, inputs_of(6, image=True).pixels)
    assert inputs.pixels.shape == (1, 3, 30, 30) and inputs.features.shape == (1, 4, 16)
    ids = inputs.input_ids[0].tolist()
    first = ids.index(PLACEHOLDER_ID)
    assert ids[first : first + 4] == [PLACEHOLDER_ID] * 4 and ids.count(PLACEHOLDER_ID) == 4
    assert 0 < first < len(ids) - 4 and max(ids) < 50
    assert min(inputs_of(5, image=False).input_ids[0]) >= 0


def test_the_command_proves_a_folder_whose_tower_is_described_elsewhere(tmp_path, capsys):
    """Both processes, from the command line; float16, and a tower whose sizes stand in vision_config.json."""
    config = config_of("llama")
    source = tmp_path / "TinyLLaVA"
    source.mkdir()
    write_checkpoint(source / "model.safetensors", MemorySource(source_tensors(config, "llama")))
    (source / "vision_config.json").write_text(json.dumps(config.pop("vision_config")))
    (source / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "some/siglip"}))
    target = tmp_path / "tinyllava.safetensors"
    arguments = ["--torch_ckpt_path", str(source), "--mindspore_ckpt_path", str(target), "--dtype", "float16"]

    status = main([*arguments, "--verify", "logits"])

    output = capsys.readouterr()
    assert status == 0, output.err
    assert "vision last norm" in output.out and "greedy ids: 32 of 32 equal" in output.out
    assert "loading the source into the reference, torch" in output.err and target.exists()
