"""The torch side of the logits check: computes all stages of a model from the source of a conversion.

`mindvlm.convert.reference.<family>_stages` defines:

    build(config, request)                   the modules, on the default device
    source_tensors(opened)                   the tensors under the names of the modules
    fill_modules(model, values, device, scope)    fills the parts of `scope` from float32 tensors
    compute(model, config, inputs, scope, num_tokens, device)    yields the stages that `scope` allows, by key
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.convert.parity.inputs import ParityRequest, inputs_of
from mindvlm.convert.parity.stages import GREEDY_IDS, STEP_LOGITS
from mindvlm.convert.reference.image_text import ImageTextReference, default_device
from mindvlm.core.errors import UserError
from mindvlm.models.registry import convertible_models
from mindvlm.weights.opened import Opened, open_native
from mindvlm.weights.rules.planning import make_plan

logger = logging.getLogger(__name__)

Stages = Iterator[tuple[str, Tensor]]


def run(request: ParityRequest) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the framework in words, and the outputs by stage, see `process.SIDES`.

    Raises:
        UserError: a source cannot be read, or its tensors do not match the config.
    """
    # TensorFloat-32 would round products to three digits
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = default_device()
    framework = f"torch {torch.__version__} on {device.type}"
    check, side = inputs_of(request.family), importlib.import_module(f"{__package__}.{request.family}_stages")
    with open_native(
        request.source_paths,
        convertible_models(),
        model=request.model,
        merge_lora=request.merge_lora,
        only=request.only,
    ) as opened:
        config = check.parity_config(request, opened.source.infos)
        scope = check.scope_of(opened.source.infos, config)
        weights = side.source_tensors(opened)
        if request.dtype != "keep":
            weights = CastSource(weights, request.dtype)
        logger.info(f"loading the source into the reference, {framework}")
        with torch.device("meta"):
            model = side.build(config, request)
        with torch.no_grad():
            side.fill_modules(model, CastSource(weights, "float32"), device, scope)
    inputs = check.make_inputs(config, scope, request)
    with torch.inference_mode():
        stages = side.compute(model, config, inputs, scope, request.num_tokens, device)
        return framework, {name: value.cpu().numpy() for name, value in stages}


def published_tensors(opened: Opened) -> TensorSource:
    """Returns the tensors of a source under the names of the published files."""
    plan = make_plan(opened.model.hf.reverse(), opened.source.infos, partial=True, origin=str(opened.source.path))
    return plan.view(opened.source)


def fill(parameter: nn.Parameter, values: TensorSource, name: str) -> None:
    """Copies one tensor in chunks.

    Raises:
        UserError: the tensor is missing or has another shape.
    """
    info = values.infos.get(name)
    if info is None or info.shape != tuple(parameter.shape):
        found = list(info.shape) if info else "missing"
        raise UserError(f"{values.path}: {name} is {found}, config.json requires {list(parameter.shape)}")
    flat, start = parameter.detach().view(-1), 0
    for chunk in values.chunks(name):
        flat[start : start + len(chunk)].copy_(torch.from_numpy(chunk))
        start += len(chunk)


def language_stages(
    model: ImageTextReference, input_ids: Tensor, image_features: Tensor | None, num_tokens: int
) -> Stages:
    """Yields embeddings, layers and logits of the prompt (1, L) from one pass, then greedy steps with the cache."""
    logger.info(f"reference: prompt of {input_ids.shape[1]} tokens")
    embeds = model.merge(input_ids, None if image_features is None else [image_features])
    yield "merged_embeddings", embeds
    hidden, block_inputs = model.transformer.decode(embeds)
    yield "layers", torch.stack([*block_inputs[1:], hidden])
    yield "logits", model.logits(hidden)
    logger.info(f"reference: {num_tokens} tokens")
    cache = model.new_cache(1, embeds.shape[1] + num_tokens)
    steps = [model.prefill(embeds, cache)]
    while len(steps) < num_tokens:
        steps.append(model.decode_step(steps[-1].argmax(-1), cache))
    logits = torch.cat(steps)
    yield STEP_LOGITS, logits
    yield GREEDY_IDS, logits.argmax(-1).int()
