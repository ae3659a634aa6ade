"""Published names -> shapes of the tensors that a config.json describes."""

from mindvlm.models.hf.towers import read_tower
from mindvlm.models.tinyllava.hf_config import from_hf_config as tinyllava_config
from mindvlm.models.tinyllava.model_config import model_shapes as tinyllava_model_shapes
from mindvlm.models.tinyllava.names import KINDS
from mindvlm.models.vary import names
from mindvlm.models.vary.hf_config import infos_of, tiny_config, toy_config
from mindvlm.nn.shapes import Shapes, vit_shapes
from mindvlm.weights.config_json import ConfigTable
from mindvlm.weights.rules.planning import make_plan
from tests.models.vary.vary_names import infos

HEAD_BIAS = "language_model.lm_head.bias"


def toy_shapes(config: dict) -> Shapes:
    """Of a Vary-toy."""
    return shapes_of(make_plan(names.HF.reverse(), infos_of(toy_config(ConfigTable(config, only_sizes=True)))))


def tiny_shapes(config: dict, *, tower: str = "vision_tower_2") -> Shapes:
    """Of a Vary-tiny; `tower` is the name of its vision vocabulary."""
    table = names.TINY_HF if tower == "vision_tower_2" else names.TINY_HF_VISION_TOWER
    return shapes_of(make_plan(table.reverse(), infos_of(tiny_config(ConfigTable(config, only_sizes=True)))))


def tinyllava_shapes(config: dict, dialect: str) -> Shapes:
    """TinyLLaVABench's names of a TinyLLaVA; `head_bias` in the config gives the head of a Phi its bias."""
    model = tinyllava_config(config, dialect=dialect)
    if "head_bias" in config:
        model.language_model.head_bias = config["head_bias"]
    native = tinyllava_model_shapes(model)
    bias = native.pop(HEAD_BIAS, None)
    table = next(kind.tables[1] for kind in KINDS if kind.dialect == dialect)
    return shapes_of(make_plan(table.reverse(), infos(native))) | ({"lm_head.bias": bias} if bias else {})


def tower_shapes(tower: dict, *, keeps_last_layer: bool = False) -> Shapes:
    """transformers' names of a tower."""
    native = vit_shapes(read_tower(ConfigTable(tower), deletes_last_layer=not keeps_last_layer))
    return {f"vision_model.{name}": shape for name, shape in native.items()}


def shapes_of(plan) -> Shapes:
    return {name: info.shape for name, info in plan.infos.items()}
