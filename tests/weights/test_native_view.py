"""Native views of a checkpoint: the model of the target tensors, under any names."""

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.weights.recognise import native_view
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import MODELS, VARY
from tests.models.vary.vary_names import SMALL, SMALL_TINY, hf_shapes, infos, random_tensors, tiny_shapes

TOY, TINY, OTHER_TINY = hf_shapes(SMALL), tiny_shapes(SMALL_TINY), tiny_shapes(SMALL_TINY, "vision_tower")


def test_the_targets_say_which_model_is_meant():
    for name, shapes in (("vary_toy", TOY), ("vary_tiny", TINY)):
        source = MemorySource({key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
        targets = make_plan(MODELS[name].hf, source.infos).infos
        assert native_view(source, VARY, target_infos=targets).infos.keys() == targets.keys()


@pytest.mark.parametrize(
    ("meant", "shapes", "table"),
    [
        ("vary_toy", TINY, "Vary-tiny with vision_tower_2"),
        ("vary_toy", OTHER_TINY, "Vary-tiny with vision_tower"),
        ("vary_tiny", TOY, "Vary-toy"),
    ],
)
def test_another_model_is_not_loaded_for_the_part_in_common(meant, shapes, table):
    source = MemorySource(random_tensors(shapes), "file.bin")
    targets = make_plan(MODELS[meant].hf, infos(TOY if meant == "vary_toy" else TINY)).infos
    with pytest.raises(UserError, match=rf"^file.bin: .* of {table}, of which {meant} takes only .*; give weights"):
        native_view(source, VARY, target_infos=targets)


def test_targets_in_common_do_not_choose_the_model():
    source = MemorySource(random_tensors(TINY))
    targets = {n: i for n, i in native_view(source, VARY).infos.items() if n.startswith("vision_vocabulary.")}
    with pytest.raises(ConversionError, match="does not fit the vary_tiny model: .* unexpected"):
        native_view(source, VARY, target_infos=targets)
    alone = MemorySource({n: t for n, t in random_tensors(TINY).items() if "vision_tower_2" in n})
    assert native_view(alone, VARY, target_infos=targets).infos.keys() == targets.keys()


def test_what_is_ambiguous_without_targets():
    source = MemorySource({"lm_head.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ConversionError, match="missing"):
        native_view(source, VARY, target_infos=make_plan(MODELS["vary_toy"].hf, infos(TOY)).infos)


def test_an_unknown_family():
    with pytest.raises(UserError, match="'family' is 'nothing'; expected one of vary, tinyllava"):
        get_family("nothing")


def test_everything_is_needed_for_a_model():
    source = MemorySource({"vision_vocabulary.pos_embed": np.zeros(1)})
    with pytest.raises(ConversionError, match="missing"):
        native_view(source, VARY, target_infos={"mm_projector.bias": TensorInfo("mm_projector.bias", "float32", (1,))})
