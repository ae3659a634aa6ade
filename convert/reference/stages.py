"""Shared steps of the torch side of the logits check: the device, filling modules, the stages of a decoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mindvlm.checkpoint import TensorSource
from mindvlm.convert.parity.stages import GREEDY_IDS, STEP_LOGITS
from mindvlm.convert.reference.image_text import ImageTextReference, default_device
from mindvlm.core.errors import UserError

logger = logging.getLogger(__name__)

Stages = Iterator[tuple[str, Tensor]]


def start() -> tuple[torch.device, str]:
    """Returns the device and a description of the framework."""
    # TensorFloat-32 would round products to three digits
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = default_device()
    return device, f"torch {torch.__version__} on {device.type}"


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
