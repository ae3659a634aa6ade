"""The stages of Vary-toy and Vary-tiny on the torch side of the logits check."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from mindvlm.checkpoint import TensorSource
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.vary.inputs import VaryInputs, VaryScope
from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.stages import Stages, fill, language_stages, published_tensors
from mindvlm.convert.reference.vary import ReferenceVary
from mindvlm.convert.reference.vary_tiny import ReferenceVaryTiny
from mindvlm.models.vary.hf_config import ImageTokens
from mindvlm.models.vary.model_config import VaryModelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """The reference class of a model and the prefixes of its parts in the state dict."""

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
    """The modules of a config: a whole model, or towers alone.

    Attributes:
        layout: prefixes of the parts.
        whole: the whole model; None without a language model.
        modules: prefix of the tensors -> module.
    """

    layout: Layout
    whole: ReferenceVary | None
    modules: dict[str, nn.Module]


source_tensors = published_tensors


def build(config: VaryModelConfig, request: ParityRequest) -> Parts:
    """Returns the modules of a config, on the default device."""
    layout = LAYOUTS[request.model]
    if config.language_model:
        whole = layout.model(config)
        whole.image_tokens = ImageTokens.of(request.config)
        known = dict(whole.named_modules())
        prefixes = (layout.clip, layout.vocabulary, *layout.projectors, *layout.language_model)
        modules = {prefix: known[prefix[:-1]] for prefix in prefixes if prefix and prefix[:-1] in known}
        return Parts(layout, whole, modules)
    modules = {}
    if config.vision_tower and layout.clip:
        modules[layout.clip] = ClipTower(config.vision_tower)
    if config.vision_vocabulary:
        modules[layout.vocabulary] = VisionVocabulary(config.vision_vocabulary)
    return Parts(layout, None, modules)


def fill_modules(parts: Parts, values: TensorSource, device: torch.device, scope: VaryScope) -> None:
    """Streams the tensors into float32 modules in chunks.

    Modules without tensors in `values` stay empty. Missing convolutions of the vocabulary are zero; the neck does not
    depend on them.

    Raises:
        UserError: the tensors do not match the config.
    """
    for prefix, module in parts.modules.items():
        if not any(name.startswith(prefix) for name in values.infos):
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
    parts: Parts, config: VaryModelConfig, inputs: VaryInputs, scope: VaryScope, num_tokens: int, device: torch.device
) -> Stages:
    """Yields the stages that `scope` allows, each computed from the previous one."""
    layout, whole = parts.layout, parts.whole
    projected = None
    if scope.connector:
        *clip, vocabulary = (torch.from_numpy(array).to(device) for array in inputs.features)
        clip = clip[0] if clip else None
    if scope.clip:
        logger.info("reference: CLIP tower")
        tower = parts.modules[layout.clip]
        states = tower.hidden_states(torch.from_numpy(inputs.clip_pixels).to(device))
        clip = states[config.vision_select_layer][:, 1:]
        yield "clip_features", clip
        yield "clip_last_hidden", states[-1]
        yield "clip_pooled", tower.pooled(states[-1])
    if scope.neck:
        logger.info("reference: vision vocabulary")
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
        yield from language_stages(whole, input_ids, projected if scope.images else None, num_tokens)
