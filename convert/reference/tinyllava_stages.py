"""The stages of a TinyLLaVA on the torch side of the logits check."""

from __future__ import annotations

import logging

import torch
from torch import nn

from mindvlm.checkpoint import TensorSource
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.tinyllava.inputs import TinyLlavaInputs, TinyLlavaScope
from mindvlm.convert.reference.clip import TowerHolder
from mindvlm.convert.reference.stages import Stages, fill, language_stages
from mindvlm.convert.reference.tinyllava import ReferenceTinyLlava
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.nn.config import VitConfig
from mindvlm.weights.opened import Opened

logger = logging.getLogger(__name__)

TOWER = "model.vision_tower.vision_tower."
CONNECTOR = "model.mm_projector"
MODULES = (
    "model.embed_tokens.",
    "model.layers.",
    "model.norm.",
    "model.final_layernorm.",
    "lm_head.",
    TOWER,
    f"{CONNECTOR}.",
)
_TOWERS = (TOWER, "model.vision_tower.", "vision_tower._vision_tower.", "vision_tower.", "")
# prefix in another layout -> prefix in TinyLLaVABench; the first match applies
PREFIXES = (
    ("connector._connector", CONNECTOR),
    ("_connector", CONNECTOR),
    *(
        (f"{model}multi_modal_projector.linear_{index + 1}.", f"{CONNECTOR}.{2 * index}.")
        for model in ("", "model.")
        for index in range(2)
    ),
    ("model.language_model.", "model."),
    ("language_model.", ""),
    *((f"{tower}vision_model.", f"{TOWER}vision_model.") for tower in _TOWERS),
    # transformers 5
    *(
        (f"{tower}{start}", f"{TOWER}vision_model.{start}")
        for tower in _TOWERS
        for start in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    ),
)


class TowerAlone(nn.Module):
    """A tower under its names in a whole model."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = TowerHolder(config)


def build(config: TinyLlavaModelConfig, request: ParityRequest) -> ReferenceTinyLlava | TowerAlone:
    return ReferenceTinyLlava(config) if config.language_model else TowerAlone(config.vision_tower)


def source_tensors(opened: Opened) -> TensorSource:
    """Returns the tensors under the names of their source; `fill_modules` knows those of all layouts."""
    return opened.way_back().view(opened.source)


def bench_name(name: str) -> str:
    """Returns TinyLLaVABench's name of a tensor of another layout."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def fill_modules(model: nn.Module, values: TensorSource, device: torch.device, scope: TinyLlavaScope) -> None:
    """Streams the tensors into float32 modules in chunks. Modules without tensors in `values` stay empty.

    Raises:
        UserError: the tensors do not match the config.
    """
    names = {bench_name(name): name for name in values.infos}
    modules = dict(model.named_modules())
    for prefix in MODULES:
        module = modules.get(prefix.removesuffix("."))
        if module is None or not any(name.startswith(prefix) for name in names):
            continue
        module.to_empty(device=device)
        for name, parameter in module.named_parameters(prefix.removesuffix(".")):
            fill(parameter, values, names.get(name, name))
    model.eval()


def compute(
    model: ReferenceTinyLlava | TowerAlone,
    config: TinyLlavaModelConfig,
    inputs: TinyLlavaInputs,
    scope: TinyLlavaScope,
    num_tokens: int,
    device: torch.device,
) -> Stages:
    """Yields the stages that `scope` allows, each computed from the previous one."""
    features = projected = None
    if scope.tower:
        logger.info("reference: vision tower")
        tower = model.model.vision_tower.vision_tower
        states = tower.hidden_states(torch.from_numpy(inputs.pixels).to(device))
        features = states[config.vision_select_layer][:, config.num_dropped_tokens :]
        yield "tower_features", features
        yield "tower_last_hidden", states[-1]
        yield "tower_pooled", tower.pooled(states[-1])
    elif scope.connector:
        features = torch.from_numpy(inputs.features).to(device)
    if scope.connector or scope.images:
        projected = model.model.mm_projector(features)
        yield "connector", projected
    if scope.language_model:
        input_ids = torch.from_numpy(inputs.input_ids)
        yield from language_stages(model, input_ids, projected if scope.images else None, num_tokens)
