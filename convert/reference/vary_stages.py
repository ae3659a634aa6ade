"""The torch side of the logits check: every stage of Vary-toy or Vary-tiny, from the source of a conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.convert.parity.comparison import ParityRequest
from mindvlm.convert.parity.inputs import VaryInputs, VaryScope, vary_config, vary_inputs
from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.stages import Say, Stages, fill, language_stages, start
from mindvlm.convert.reference.vary import ReferenceVary
from mindvlm.convert.reference.vary_layout import clip_config, vocabulary_config
from mindvlm.convert.reference.vary_tiny import ReferenceVaryTiny
from mindvlm.weights.opened import open_native


@dataclass(frozen=True)
class Layout:
    """Where a model's state dict has its parts: prefixes of tensor names."""

    model: type[ReferenceVary]
    clip: str | None
    vocabulary: str
    projectors: tuple[str, ...]
    language_model: tuple[str, ...]


LAYOUTS = {
    "vary_toy": Layout(
        ReferenceVary,
        "transformer.vision_tower.",
        "transformer.vision_tower_high.",
        ("transformer.mm_projector.", "transformer.mm_projector_vary."),
        ("transformer.wte.", "transformer.h.", "transformer.ln_f.", "lm_head."),
    ),
    "vary_tiny": Layout(
        ReferenceVaryTiny, None, "model.vision_tower_2.", ("model.mm_projector.",), ("model.decoder.",)
    ),
}


@dataclass(frozen=True)
class Parts:
    """The modules that a config describes: those of a whole, or towers alone.

    Attributes:
        whole: with `merge`, `prefill`, ...; None without a language model.
        modules: by the prefix of their tensors.
    """

    layout: Layout
    whole: ReferenceVary | None
    modules: dict[str, nn.Module]


def run(request: ParityRequest, say: Say) -> tuple[str, dict[str, np.ndarray]]:
    """The framework in words, and the stages by the keys of `mindvlm.convert.parity.MODELS`.

    Raises:
        UserError: a source cannot be read, or its tensors are not those that the config describes.
    """
    request = dataclasses.replace(request, config=vary_config(request.config))
    device, framework = start()
    with open_native(
        request.source_paths, model=request.model, merge_lora=request.merge_lora, only=request.only
    ) as opened:
        scope = VaryScope.of(opened.source.infos, request.config)
        plan = opened.model.hf.reverse().plan(opened.source.infos, partial=True, origin=str(opened.source.path))
        weights: TensorSource = plan.view(opened.source)
        if request.dtype != "keep":
            weights = CastSource(weights, request.dtype)
        say(f"loading the source into the reference, {framework}")
        with torch.device("meta"):
            parts = make_parts(request.config, LAYOUTS[request.model])
        with torch.no_grad():
            fill_parts(parts, weights, device, scope)
    inputs = vary_inputs(request.config, request.seed, image=scope.images)
    with torch.inference_mode():
        computed = compute(parts, inputs, scope, request, say, device)
        return framework, {name: value.cpu().numpy() for name, value in computed}


def make_parts(config: dict[str, Any], layout: Layout) -> Parts:
    """The modules, without values where the default device is "meta"."""
    if "num_hidden_layers" in config:
        whole = layout.model(config)
        known = dict(whole.named_modules())
        prefixes = (layout.clip, layout.vocabulary, *layout.projectors, *layout.language_model)
        modules = {prefix: known[prefix[:-1]] for prefix in prefixes if prefix and prefix[:-1] in known}
        return Parts(layout, whole, modules)
    modules = {}
    if "vision_config" in config and layout.clip:
        modules[layout.clip] = ClipTower(clip_config(config))
    if "vision_high_config" in config:
        modules[layout.vocabulary] = VisionVocabulary(vocabulary_config(config))
    return Parts(layout, None, modules)


def fill_parts(parts: Parts, weights: TensorSource, device: torch.device, scope: VaryScope) -> None:
    """Stream the tensors in pieces into float32 modules, so that nothing is held twice.

    Modules that `weights` has nothing of stay empty. Convolutions that the vocabulary does not come with are zero; the
    neck does not depend on them.

    Raises:
        UserError: the tensors are not those that the config describes.
    """
    values = CastSource(weights, "float32")
    for prefix, module in parts.modules.items():
        if not any(name.startswith(prefix) for name in weights.infos):
            continue
        module.to_empty(device=device).eval()
        for name, parameter in module.named_parameters():
            convolution = prefix == parts.layout.vocabulary and name.startswith(("net_2.", "net_3."))
            if convolution and not scope.vocabulary:
                nn.init.zeros_(parameter)
            else:
                fill(parameter, values, prefix + name)
    if parts.whole is not None:
        parts.whole.eval()


def compute(
    parts: Parts, inputs: VaryInputs, scope: VaryScope, request: ParityRequest, say: Say, device: torch.device
) -> Stages:
    """Yield every stage that `scope` allows, each from the one before it."""
    layout, whole = parts.layout, parts.whole
    projected = None
    if scope.connector:
        clip, vocabulary = (torch.from_numpy(array).to(device) for array in inputs.features)
    if scope.clip:
        say("reference: CLIP tower")
        tower = parts.modules[layout.clip]
        states = tower.hidden_states(torch.from_numpy(inputs.clip_pixels).to(device))
        clip = states[request.config.get("vision_select_layer", -2)][:, 1:]
        yield "clip_features", clip
        yield "clip_last_hidden", states[-1]
        yield "clip_pooled", tower.pooled(states[-1])
    if scope.neck:
        say("reference: vision vocabulary")
        maps = parts.modules[layout.vocabulary].stages(torch.from_numpy(inputs.high_pixels).to(device))
        yield "vocabulary_neck", maps["neck"].permute(0, 2, 3, 1)
        if scope.vocabulary:
            vocabulary = maps["tokens"]
            yield "vocabulary_features", vocabulary
    if scope.connector:
        if layout.clip:
            projected = whole.project(clip, vocabulary)
        else:
            projected = parts.modules[layout.projectors[0]](vocabulary)
        yield "connector", projected
    if scope.language_model:
        input_ids = torch.from_numpy(inputs.input_ids)
        yield from language_stages(whole, input_ids, projected if scope.images else None, request.num_tokens, say)
