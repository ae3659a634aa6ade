"""The torch side of the logits check: every stage of Vary-toy or Vary-tiny, from the source of a conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.convert.opened import open_native
from mindvlm.convert.parity.comparison import GREEDY_IDS, STEP_LOGITS, ParityRequest
from mindvlm.convert.parity.inputs import VaryInputs, VaryScope, vary_config, vary_inputs
from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary import ReferenceVary, default_device
from mindvlm.convert.reference.vary_layout import clip_config, vocabulary_config
from mindvlm.convert.reference.vary_tiny import ReferenceVaryTiny
from mindvlm.errors import UserError

Stages = Iterator[tuple[str, Tensor]]
Say = Callable[[str], None]


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
    # TensorFloat-32 would round every product to three digits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = default_device()
    framework = f"torch {torch.__version__} on {device.type}"
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

    Modules that `weights` has nothing of stay empty, but projectors, which cost little and of which a model asks the
    device. Convolutions that the vocabulary does not come with are zero; the neck does not depend on them.

    Raises:
        UserError: the tensors are not those that the config describes.
    """
    values = CastSource(weights, "float32")
    for prefix, module in parts.modules.items():
        if not any(name.startswith(prefix) for name in weights.infos):
            if prefix in parts.layout.projectors:
                module.to_empty(device=device)
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


def fill(parameter: nn.Parameter, values: TensorSource, name: str) -> None:
    """Copy one tensor, piece by piece.

    Raises:
        UserError: there is no such tensor, or it has another shape.
    """
    info = values.infos.get(name)
    if info is None or info.shape != tuple(parameter.shape):
        found = list(info.shape) if info else "missing"
        raise UserError(f"{values.path}: {name} is {found}, config.json asks for {list(parameter.shape)}")
    flat, start = parameter.detach().view(-1), 0
    for chunk in values.chunks(name):
        flat[start : start + len(chunk)].copy_(torch.from_numpy(chunk))
        start += len(chunk)


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
        yield from language_stages(whole, inputs, projected if scope.images else None, request.num_tokens, say)


def language_stages(
    model: ReferenceVary, inputs: VaryInputs, image_features: Tensor | None, num_tokens: int, say: Say
) -> Stages:
    """Embeddings, layers and logits of the prompt in one pass, then greedy steps with the cache."""
    input_ids = torch.from_numpy(inputs.input_ids)
    say(f"reference: prompt of {input_ids.shape[1]} tokens")
    embeds = model.merge(input_ids, None if image_features is None else [image_features])
    yield "merged_embeddings", embeds
    hidden, block_inputs = model.transformer.decode(embeds)
    yield "layers", torch.stack([*block_inputs[1:], hidden])
    yield "logits", model.logits(hidden)
    say(f"reference: {num_tokens} tokens")
    cache = model.new_cache(1, embeds.shape[1] + num_tokens)
    steps = [model.prefill(embeds, cache)]
    while len(steps) < num_tokens:
        steps.append(model.decode_step(steps[-1].argmax(-1), cache))
    logits = torch.cat(steps)
    yield STEP_LOGITS, logits
    yield GREEDY_IDS, logits.argmax(-1).int()
