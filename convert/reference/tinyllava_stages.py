"""The torch side of the logits check: every stage of a TinyLLaVA, from the source of a conversion in its own layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.convert.parity.comparison import ParityRequest
from mindvlm.convert.parity.tinyllava_inputs import TinyLlavaInputs, TinyLlavaScope, parity_form, tinyllava_inputs
from mindvlm.convert.reference.stages import Say, Stages, fill, language_stages, start
from mindvlm.convert.reference.tinyllava import ReferenceTinyLlava, TowerHolder
from mindvlm.convert.reference.tinyllava_form import image_feature
from mindvlm.weights.opened import open_native

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
# how the names of other layouts begin, and those of TinyLLaVABench; the first that fits
PREFIXES = (
    ("vision_tower._vision_tower.", TOWER),
    ("connector._connector", CONNECTOR),
    ("multi_modal_projector.linear_1.", f"{CONNECTOR}.0."),
    ("multi_modal_projector.linear_2.", f"{CONNECTOR}.2."),
    ("base_model.model.model.mm_projector", CONNECTOR),
    ("language_model.", ""),
    ("vision_tower.vision_model.", f"{TOWER}vision_model."),
    ("vision_model.", f"{TOWER}vision_model."),
    # transformers 5
    ("vision_tower.", f"{TOWER}vision_model."),
    *(
        (start, f"{TOWER}vision_model.{start}")
        for start in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    ),
)


class TowerAlone(nn.Module):
    """A tower under the names that it has in a whole."""

    def __init__(self, form: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = TowerHolder(form["vision_config"])


def run(request: ParityRequest, say: Say) -> tuple[str, dict[str, np.ndarray]]:
    """The framework in words, and the stages by the keys of `mindvlm.convert.parity.MODELS`.

    Raises:
        UserError: a source cannot be read, or its tensors are not those that the config describes.
    """
    device, framework = start()
    with open_native(
        request.source_paths, model=request.model, merge_lora=request.merge_lora, only=request.only
    ) as opened:
        form = parity_form(request.config, request.model, opened.source.infos)
        scope = TinyLlavaScope.of(opened.source.infos, form)
        weights: TensorSource = opened.way_back().view(opened.source)
        if request.dtype != "keep":
            weights = CastSource(weights, request.dtype)
        say(f"loading the source into the reference, {framework}")
        with torch.device("meta"):
            model = ReferenceTinyLlava(form) if "dialect" in form else TowerAlone(form)
        with torch.no_grad():
            fill_modules(model, weights, device)
    inputs = tinyllava_inputs(form, request.seed, image=scope.images)
    with torch.inference_mode():
        stages = compute(model, form, inputs, scope, request.num_tokens, say, device)
        return framework, {name: value.cpu().numpy() for name, value in stages}


def bench_name(name: str) -> str:
    """What TinyLLaVABench calls a tensor of another layout."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def fill_modules(model: nn.Module, weights: TensorSource, device: torch.device) -> None:
    """Stream the tensors in pieces into float32 modules; those that `weights` has nothing of stay empty.

    Raises:
        UserError: the tensors are not those that the config describes.
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
    form: Mapping[str, Any],
    inputs: TinyLlavaInputs,
    scope: TinyLlavaScope,
    num_tokens: int,
    say: Say,
    device: torch.device,
) -> Stages:
    """Yield every stage that `scope` allows, each from the one before it."""
    features = projected = None
    if scope.tower:
        say("reference: vision tower")
        tower = model.model.vision_tower.vision_tower
        states = tower.hidden_states(torch.from_numpy(inputs.pixels).to(device))
        select_layer, num_dropped_tokens = image_feature(form)
        features = states[select_layer][:, num_dropped_tokens:]
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
        yield from language_stages(model, input_ids, projected if scope.images else None, num_tokens, say)
