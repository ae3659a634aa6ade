"""Without a config.json, a tensor of wrong size is found by what the others ask for."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.planning import make_plan
from tests import hf_shapes as shapes_of_config
from tests.known_models import MODELS
from tests.models.vary.vary_names import SMALL, SMALL_TINY, TINY, TOY, hf_shapes, infos, tiny_shapes


def tinyllava_config(tower: str, connector: str, n: list[int], dialect: str) -> dict:
    """A config from twelve numbers; only Llama has fewer key heads than query heads."""
    groups = n[1] if dialect == "llama" else 1
    return {
        "hidden_size": n[0] * groups * 8 * n[2], "num_attention_heads": n[0] * groups, "num_key_value_heads": n[0],
        "intermediate_size": n[3], "vocab_size": n[4], "num_hidden_layers": n[5], "use_qkv_bias": True,
        "mm_projector_type": connector, "resampler_hidden_size": 12 * n[6], "num_queries": n[7],
        "num_resampler_layers": 2,
        "vision_config": {
            "model_type": tower, "hidden_size": n[8], "intermediate_size": n[9], "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "patch_size": n[10], "image_size": n[10] * n[11],
        },
    }  # fmt: skip


TINYLLAVA_DIALECTS = ("phi", "stablelm", "llama")
TINYLLAVA = tinyllava_config("siglip", "mlp2x_gelu", [2, 3, 8, 40, 50, 3, 24, 5, 32, 36, 7, 4], "llama")
SHAPES = {"vary_toy": hf_shapes(SMALL), "vary_tiny": tiny_shapes(SMALL_TINY)}
# Tensors with an axis whose size nothing else asks for.
UNKNOWN = ("pos_embed", "position", "rel_pos", "patch_embed")
SHAPES |= {
    f"tinyllava_{dialect}": shapes_of_config.tinyllava_shapes(TINYLLAVA, dialect) for dialect in TINYLLAVA_DIALECTS
}


def check(model, source):
    plan = make_plan(MODELS[model].hf, source, partial=True)
    MODELS[model].require_consistent_sizes(plan, "file.bin")


@pytest.mark.parametrize(
    ("model", "shapes"),
    [*SHAPES.items(), ("vary_toy", hf_shapes(TOY)), ("vary_tiny", tiny_shapes(TINY))],
    ids=["small toy", "small tiny", *(f"small {dialect}" for dialect in TINYLLAVA_DIALECTS), "toy", "tiny"],
)
def test_whole_models_and_parts_fit_together(model, shapes):
    check(model, infos(shapes))
    for part in MODELS[model].hf.parts:
        targets = make_plan(MODELS[model].hf, infos(shapes)).infos
        native = {name: info for name, info in targets.items() if part.produces(name)}
        plan = make_plan(MODELS[model].native, native, partial=True)
        assert plan.infos or part.choice
        MODELS[model].require_consistent_sizes(plan)


@settings(max_examples=25)
@given(st.sampled_from(["vary_tiny", "vary_toy"]), st.lists(st.integers(1, 9), min_size=20, max_size=20))
def test_models_of_any_sizes_fit_together(model, n):
    """No two numbers of the example are equal by accident: whichever is changed alone, nothing is found."""
    vocabulary = {
        "embed_dim": 4 * n[0], "num_heads": 4, "depth": n[1], "global_attn_indexes": [0], "window_size": n[2],
        "image_size": [n[3] * n[4], n[3] * n[5]], "patch_size": n[3], "out_chans": n[6], "net_2_channels": n[7],
        "net_3_channels": n[8],
    }  # fmt: skip
    clip = {"hidden_size": n[9], "intermediate_size": n[10], "num_hidden_layers": n[11], "patch_size": n[12]}
    # as many patches as the vocabulary has tokens
    clip |= {"num_attention_heads": 1, "image_size": [-(-n[4] // 4) * n[12], -(-n[5] // 4) * n[12]]}
    config = {
        "hidden_size": 2 * n[13] * n[15], "vocab_size": n[14], "num_attention_heads": n[15], "kv_channels": 2 * n[16],
        "intermediate_size": 2 * n[17], "num_hidden_layers": n[18], "ffn_dim": n[17], "max_position_embeddings": n[19],
        "vision_high_config": vocabulary, "vision_config": clip,
    }  # fmt: skip
    shapes = {"vary_toy": shapes_of_config.toy_shapes, "vary_tiny": shapes_of_config.tiny_shapes}[model](config)
    check(model, infos(shapes))


@settings(max_examples=25)
@given(
    st.sampled_from(TINYLLAVA_DIALECTS),
    st.sampled_from(["siglip", "clip"]),
    st.sampled_from(["linear", "mlp2x_gelu", "resampler"]),
    st.lists(st.integers(1, 9), min_size=12, max_size=12),
)
def test_tinyllavas_of_any_sizes_fit_together(dialect, tower, connector, n):
    config = tinyllava_config(tower, connector, n, dialect)
    check(f"tinyllava_{dialect}", infos(shapes_of_config.tinyllava_shapes(config, dialect)))


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("change", ["size", "axis"])
def test_any_misshapen_tensor_is_named(model, change):
    source = infos(SHAPES[model])
    num_named = 0
    for name, info in source.items():
        shape = (3 * info.shape[0], *info.shape[1:]) if change == "size" else (*info.shape, 1)
        changed = {**source, name: replace(info, shape=shape)}
        if change == "size" and any(part in name for part in UNKNOWN):
            continue
        with pytest.raises(ConversionError) as caught:
            check(model, changed)
        assert name in {finding.name for finding in caught.value.findings}, name
        assert len(caught.value.findings) <= 2, name
        num_named += 1
    assert num_named > 0.8 * len(source)


def test_wrong_kind_of_numbers_is_named():
    source = infos(SHAPES["vary_toy"])
    name = "transformer.h.0.mlp.w1.weight"
    source[name] = replace(source[name], dtype="int8")
    with pytest.raises(
        ConversionError,
        match=r"file.bin does not fit together: 1 dtype; first: dtype transformer.h.0.mlp.w1.weight "
        r"\(int8, expected floating point\)",
    ):
        check("vary_toy", source)


def test_findings_bear_the_names_of_the_files():
    """Layers are checked together under native names; findings show the names of the user's files."""
    model, source = MODELS["vary_toy"], infos(SHAPES["vary_toy"])
    name = "transformer.h.0.attn.c_attn.weight"
    source[name] = replace(source[name], shape=(24, 9))
    layer = make_plan(model.hf, source, partial=True)
    whole = make_plan(model.native, layer.infos, partial=True)
    with pytest.raises(ConversionError) as caught:
        model.require_consistent_sizes(whole, sources_of=layer.sources_of)
    assert [(finding.status, finding.name) for finding in caught.value.findings] == [("shape", name)]
