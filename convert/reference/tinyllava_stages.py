"""The torch side of the logits check: computes all stages of a TinyLLaVA from the source of a conversion."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.tinyllava.inputs import TinyLlavaInputs, TinyLlavaScope, parity_config, tinyllava_inputs
from mindvlm.convert.reference.clip import TowerHolder
from mindvlm.convert.reference.stages import Stages, fill, language_stages, start
from mindvlm.convert.reference.tinyllava import ReferenceTinyLlava
from mindvlm.models.registry import convertible_models
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.nn.config import VitConfig
from mindvlm.weights.opened import open_native

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


def run(request: ParityRequest) -> tuple[str, dict[str, np.ndarray]]:
    """Returns a description of the framework, and the stages by the keys of `stages_of`.

    Raises:
        UserError: a source cannot be read, or its tensors do not match the config.
    """
    device, framework = start()
    with open_native(
        request.source_paths,
        convertible_models(),
        model=request.model,
        merge_lora=request.merge_lora,
        only=request.only,
    ) as opened:
        config = parity_config(request.config, request.model, opened.source.infos)
        scope = TinyLlavaScope.of(opened.source.infos, config)
        weights: TensorSource = opened.way_back().view(opened.source)
        if request.dtype != "keep":
            weights = CastSource(weights, request.dtype)
        logger.info(f"loading the source into the reference, {framework}")
        with torch.device("meta"):
            model = ReferenceTinyLlava(config) if config.language_model else TowerAlone(config.vision_tower)
        with torch.no_grad():
            fill_modules(model, weights, device)
    inputs = tinyllava_inputs(config, request.seed, image=scope.images)
    with torch.inference_mode():
        stages = compute(model, config, inputs, scope, request.num_tokens, device)
        return framework, {name: value.cpu().numpy() for name, value in stages}


def bench_name(name: str) -> str:
    """Returns TinyLLaVABench's name of a tensor of another layout."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def fill_modules(model: nn.Module, weights: TensorSource, device: torch.device) -> None:
    """Streams the tensors into float32 modules in chunks. Modules without tensors in `weights` stay empty.

    Raises:
        UserError: the tensors do not match the config.
    """
    values = CastSource(weights, "float32")
    names = {bench_name(name): name for name in weights.infos}
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
