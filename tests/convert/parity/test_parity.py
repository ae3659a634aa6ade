"""The logits check: right conversions pass, planted swaps fail at the stage where they enter."""

import numpy as np
import pytest

from mindvlm.convert.parity.stages import STEP_LOGITS
from mindvlm.convert.parity.vary import MODELS
from mindvlm.convert.parity.vary.inputs import VaryInputs, VaryScope, make_inputs, parity_config, scope_of
from tests.convert.parity.parity_bench import (
    CONFIG,
    NUM_TOKENS,
    TEXT_CONFIG,
    TINY_CONFIG,
    TOWERS,
    Bench,
    mindocr_tensors,
    native_tensors,
    part,
    request,
    source_tensors,
    swapped,
)

SOURCE = source_tensors(CONFIG)
NATIVE = native_tensors(SOURCE)
LAYER = "language_model.layers.1."
CLIP_LAYER = "vision_tower.encoder.layers."
# Two tensors of equal shape, and the stage that must name the swap.
SWAPS = [
    (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight", "decoder layers"),
    (LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", "decoder layers"),
    (LAYER + "self_attn.q_proj.bias", LAYER + "self_attn.v_proj.bias", "decoder layers"),
    (LAYER + "self_attn.k_proj.bias", "language_model.layers.2.self_attn.k_proj.bias", "decoder layers"),
    (LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight", "decoder layers"),
    (LAYER + "mlp.down_proj.weight", "language_model.layers.2.mlp.down_proj.weight", "decoder layers"),
    (LAYER + "input_layernorm.weight", "language_model.norm.weight", "decoder layers"),
    ("language_model.embed_tokens.weight", "language_model.lm_head.weight", "merged embeddings"),
    ("mm_projector.weight", "mm_projector_vary.weight", "connector"),
    ("mm_projector.bias", "mm_projector_vary.bias", "connector"),
    (CLIP_LAYER + "0.mlp.fc1.weight", CLIP_LAYER + "0.mlp.fc2.weight", "CLIP features"),
    (CLIP_LAYER + "0.mlp.fc1.bias", CLIP_LAYER + "1.mlp.fc1.bias", "CLIP features"),
    (CLIP_LAYER + "0.self_attn.q_proj.weight", CLIP_LAYER + "0.self_attn.k_proj.weight", "CLIP features"),
    (CLIP_LAYER + "2.layer_norm1.bias", CLIP_LAYER + "2.layer_norm2.bias", "CLIP last layer"),
    (CLIP_LAYER + "2.layer_norm2.weight", "vision_tower.post_layernorm.weight", "CLIP last layer"),
    ("vision_tower.embeddings.class_embedding", "vision_tower.pre_layrnorm.bias", "CLIP features"),
    ("vision_vocabulary.blocks.0.attn.qkv.bias", "vision_vocabulary.blocks.1.attn.qkv.bias", "vocabulary neck"),
    ("vision_vocabulary.blocks.1.mlp.lin1.bias", "vision_vocabulary.blocks.0.mlp.lin1.bias", "vocabulary neck"),
    ("vision_vocabulary.neck.1.weight", "vision_vocabulary.neck.3.weight", "vocabulary neck"),
    ("vision_vocabulary.blocks.0.attn.rel_pos_h", "vision_vocabulary.blocks.0.attn.rel_pos_w", "vocabulary neck"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), CONFIG, SOURCE, compiled=True)


@pytest.mark.parametrize("naming", ["native", "hf", "mindocr"])
def test_right_conversions_pass_whatever_the_names(bench, naming):
    tensors = {"native": NATIVE, "hf": SOURCE, "mindocr": mindocr_tensors(SOURCE)}[naming]
    for name, value in bench.reference(tensors).items():
        np.testing.assert_array_equal(value, bench.expected[name])

    report = bench.report(NATIVE, tensors)

    assert report.passed and report.failure() is None
    assert [stage.key for stage in report.stages] == list(MODELS["vary_toy"])
    assert max(stage.relative_error for stage in report.stages) < 1e-5
    assert report.num_equal == len(report.tokens) == NUM_TOKENS


@pytest.fixture(scope="module")
def tiny_bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("tiny"), TINY_CONFIG, source_tensors(TINY_CONFIG), compiled=True)


@pytest.mark.parametrize("native", [False, True])
def test_right_conversions_of_vary_tiny_pass(tiny_bench, native):
    tensors = source_tensors(TINY_CONFIG)

    report = tiny_bench.report(native_tensors(tensors), None if native else tensors)

    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == list(MODELS["vary_tiny"])
    assert report.num_equal == len(report.tokens) == NUM_TOKENS


@pytest.mark.parametrize(
    ("first", "second", "title"),
    [
        (LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", "decoder layers"),
        (LAYER + "self_attn.o_proj.bias", LAYER + "mlp.fc2.bias", "decoder layers"),
        (LAYER + "input_layernorm.bias", LAYER + "post_attention_layernorm.bias", "decoder layers"),
        ("language_model.norm.weight", "mm_projector.bias", "connector"),
        ("vision_vocabulary.neck.1.bias", "vision_vocabulary.neck.3.bias", "vocabulary neck"),
    ],
)
def test_planted_swaps_in_vary_tiny_fail_where_they_enter(tiny_bench, first, second, title):
    report = tiny_bench.report(swapped(native_tensors(source_tensors(TINY_CONFIG)), first, second))

    assert report.failed_stages[0].title == title


@pytest.mark.parametrize(("first", "second", "title"), SWAPS)
def test_planted_swaps_fail_where_they_enter(bench, first, second, title):
    report = bench.report(swapped(NATIVE, first, second))

    assert not report.passed
    assert report.failed_stages[0].title == title
    assert f"stage {title} is wrong, the stages before it are right (relative error" in report.failure()
    if title == "decoder layers":
        assert "from layer 1 on" in report.failure()


def test_every_tensor_counts(bench):
    """Only the key biases of an attention without rotary positions may change without any effect."""
    without_effect = []
    for name, value in NATIVE.items():
        # a constant on all values would vanish in a norm
        noise = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)
        report = bench.report(NATIVE | {name: value + 0.1 * noise})
        if report.passed:
            without_effect.append(name)
    assert without_effect == [f"{CLIP_LAYER}{layer}.self_attn.k_proj.bias" for layer in range(3)]


@pytest.mark.parametrize(
    ("prefixes", "keys"),
    [
        (("vision_tower.",), ["clip_features", "clip_last_hidden", "clip_pooled"]),
        (("vision_vocabulary.",), ["vocabulary_neck", "vocabulary_features"]),
        (("mm_projector",), ["connector"]),
        (("language_model.", "vision_tower."), ["clip_features", "clip_last_hidden", "clip_pooled",
                                                "merged_embeddings", "layers", "logits", STEP_LOGITS]),
    ],
)  # fmt: skip
def test_parts_are_compared_as_far_as_they_go(tmp_path, prefixes, keys):
    tensors = part(NATIVE, *prefixes)

    report = Bench(tmp_path, CONFIG, tensors).report(tensors)

    assert report.passed, report.table()
    assert [stage.key for stage in report.stages] == keys


def test_a_published_sam_is_compared_up_to_its_neck(tmp_path):
    prefix = "vision_vocabulary."
    native = {name: value for name, value in part(NATIVE, prefix).items() if ".net_" not in name}
    raw = {"image_encoder." + name.removeprefix(prefix): value for name, value in native.items()}

    bench = Bench(tmp_path, CONFIG, raw)

    assert [stage.key for stage in bench.report(native).stages] == ["vocabulary_neck"]
    broken = swapped(native, prefix + "neck.1.weight", prefix + "neck.1.bias")
    assert not bench.report(broken).passed


def inputs_of(config: dict, seed: int, *, image: bool) -> VaryInputs:
    wanted = request("", "", config, seed=seed)
    scope = VaryScope(*[image] * 6)
    return make_inputs(parity_config(wanted, ()), scope, wanted)


def test_inputs_are_seeded_and_fit_the_config():
    inputs, again = inputs_of(CONFIG, 5, image=True), inputs_of(CONFIG, 5, image=True)
    np.testing.assert_array_equal(inputs.clip_pixels, again.clip_pixels)
    assert not np.array_equal(inputs.clip_pixels, inputs_of(CONFIG, 6, image=True).clip_pixels)
    assert inputs.clip_pixels.shape == (1, 3, 28, 56) and inputs.high_pixels.shape == (1, 3, 128, 256)
    ids = inputs.input_ids[0].tolist()
    start, end = ids.index(61), ids.index(62)
    assert ids.count(61) == ids.count(62) == 1
    assert ids[start + 1 : end] == [63] * 8 and ids.count(63) == 8
    assert len(set(ids[:start])) > 5 and len(set(ids[end:])) > 5
    assert 0 <= min(ids) and max(ids) < 64
    assert not {61, 62, 63} & set(inputs_of(CONFIG, 5, image=False).input_ids[0].tolist())
    assert inputs_of(TOWERS, 0, image=False).input_ids is None
    assert inputs_of(TEXT_CONFIG, 0, image=False).clip_pixels is None


def test_the_parts_of_a_model_are_told_apart():
    config = parity_config(request("", "", CONFIG), ())
    scope = scope_of(NATIVE, config)
    assert scope.images and scope.language_model
    assert not any(vars(scope_of(["mm_projector.weight"], config)).values())
