"""The Vary tables account for every tensor of Vary-toy under both foreign namings and lead to the same model."""

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.vary import names as vary
from mindvlm.weights.recognise import native_view
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import MODELS, VARY
from tests.models.vary.vary_names import SMALL, TOY, hf_shapes, infos, mindocr_name

VARY_TOY = MODELS["vary_toy"]


def hf_tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in hf_shapes(SMALL).items()}


def to_mindocr(tensors):
    """A state dict as MindOCR's converter writes it: renamed, c_attn cut into wq, wk, wv."""
    result = {}
    for name, array in tensors.items():
        if "c_attn" in name:
            for part, piece in zip("qkv", np.split(array, 3), strict=True):
                result[mindocr_name(name).replace("attn.c_attn", f"attention.w{part}")] = piece
        else:
            result[mindocr_name(name)] = array
    return result


def native(tensors) -> dict[str, np.ndarray]:
    view = native_view(MemorySource(tensors), VARY)
    return {name: view.read(name).data for name in view.infos}


def test_vary_toy_is_fully_accounted_for():
    source = infos(hf_shapes(TOY))
    assert len(source) == 769
    assert sum(info.num_elements for info in source.values()) == 2_237_365_504
    plan = make_plan(VARY_TOY.detect_table(source), source)
    assert plan.table is vary.HF and not plan.dropped
    assert sum(info.num_elements for info in plan.infos.values()) == 2_237_365_504
    assert len(plan.infos) == 769 + 24 * 2 * 2
    counts = {"language_model": 195 + 96, "vision_tower": 391, "vision_vocabulary": 179}
    for part, count in counts.items():
        assert sum(name.startswith(part + ".") for name in plan.infos) == count
    assert {info.num_elements for info in plan.infos.values() if ".q_proj.weight" in info.name} == {2048**2, 1024**2}


def test_every_rule_of_both_tables_is_used():
    source = infos(hf_shapes(TOY))
    plan = make_plan(vary.HF, source)
    optional = {rule for rule in vary.HF.rules if not rule.targets}
    assert set(plan.uses) == set(vary.HF.rules) - optional
    plan = make_plan(vary.MINDOCR, MemorySource(to_mindocr(hf_tensors())).infos)
    assert set(plan.uses) == {rule for rule in vary.MINDOCR.rules if rule.targets}


def test_the_three_namings_give_the_same_model():
    tensors = hf_tensors()
    ours = native(tensors)
    theirs = native(to_mindocr(tensors))
    again = native(ours)
    assert ours.keys() == theirs.keys() == again.keys()
    for name, array in ours.items():
        assert np.array_equal(theirs[name], array), name
        assert np.array_equal(again[name], array), name


def test_what_is_not_a_plain_renaming():
    tensors = hf_tensors()
    ours = native(tensors)
    layer = "language_model.layers.1."
    stacked = np.concatenate([ours[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
    assert np.array_equal(stacked, tensors["transformer.h.1.attn.c_attn.weight"])
    assert np.array_equal(ours[layer + "mlp.gate_proj.weight"], tensors["transformer.h.1.mlp.w2.weight"])
    assert np.array_equal(ours[layer + "mlp.up_proj.weight"], tensors["transformer.h.1.mlp.w1.weight"])
    theirs = to_mindocr(tensors)
    assert np.array_equal(ours[layer + "mlp.gate_proj.weight"], theirs["transformer.layers.1.feed_forward.w3.weight"])
    assert np.array_equal(ours[layer + "mlp.down_proj.weight"], theirs["transformer.layers.1.feed_forward.w2.weight"])
    assert np.array_equal(
        ours["vision_tower.post_layernorm.bias"],
        theirs["transformer.vision_tower.vision_model.post_layernorm.bias"],
    )


@pytest.mark.parametrize("table", [vary.HF, vary.MINDOCR])
def test_the_way_back(table):
    tensors = hf_tensors() if table is vary.HF else to_mindocr(hf_tensors())
    there = native_view(MemorySource(tensors), VARY)
    back = make_plan(table.reverse(), there.infos).view(there)
    assert set(back.infos) == set(tensors)
    assert all(np.array_equal(back.read(name).data, array) for name, array in tensors.items())


def test_optional_buffers_are_dropped():
    extra = {
        "transformer.vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None],
        "transformer.rotary_emb.inv_freq": np.ones(2, np.float32),
        "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool),
        "transformer.h.1.attn.masked_bias": np.float32(-1e4),
    }
    view = native_view(MemorySource({**hf_tensors(), **extra}), VARY)
    assert set(view.plan.dropped) == set(extra)
    assert set(view.infos) == set(native(hf_tensors()))


PARTS = {
    "clip": ("transformer.vision_tower.", "vision_tower."),
    "sam": ("transformer.vision_tower_high.", "vision_vocabulary."),
    "projectors": ("transformer.mm_projector", "mm_projector"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rename", [dict, to_mindocr])
def test_a_part_alone(part, rename):
    source, target = PARTS[part]
    tensors = {name: array for name, array in hf_tensors().items() if name.startswith(source)}
    ours = native(rename(tensors))
    assert len(ours) == len(tensors) and all(name.startswith(target) for name in ours)


def test_the_language_model_alone():
    tensors = {n: a for n, a in hf_tensors().items() if "vision" not in n and "projector" not in n}
    assert all(name.startswith("language_model.") for name in native(tensors))


def test_a_lost_tensor_is_named_even_without_a_config():
    tensors = hf_tensors()
    del tensors["transformer.vision_tower_high.blocks.1.attn.rel_pos_w"]
    with pytest.raises(ConversionError, match="missing transformer.vision_tower_high.blocks.1.attn.rel_pos_w"):
        native_view(MemorySource(tensors), VARY)


def test_a_lost_part_is_named_with_the_model():
    tensors = hf_tensors()
    targets = MemorySource(native(tensors)).infos
    rest = {name: array for name, array in tensors.items() if "vision_tower_high" not in name}
    with pytest.raises(ConversionError, match="missing transformer.vision_tower_high"):
        native_view(MemorySource(rest), VARY, target_infos=targets)
    assert native_view(MemorySource(tensors), VARY, target_infos=targets).infos.keys() == targets.keys()


def test_other_sizes_are_refused():
    targets = make_plan(vary.HF, infos(hf_shapes(SMALL))).infos
    other = infos(hf_shapes({**SMALL, "mlp": 16}))
    with pytest.raises(ConversionError) as caught:
        make_plan(vary.HF, other, targets)
    rows = {row.label: row.detail for row in caught.value.rows}
    assert rows["transformer.h.{}.mlp.w1.weight (0-1)"] == "[16, 8], the model has [12, 8]"
    assert len(rows) == 3


@pytest.mark.parametrize("names", [["model.layers.0.mlp.up_proj.weight"], ["lm_head.weight", "model.a", "model.b"]])
def test_another_model_is_recognised_as_such(names):
    with pytest.raises(UserError, match="not a Vary checkpoint") as caught:
        VARY_TOY.detect_table({name: TensorInfo(name, "float32", (1,)) for name in names}, "file.bin")
    assert str(caught.value).startswith("file.bin") and "\n" not in str(caught.value)
