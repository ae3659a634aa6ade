"""Scope and inputs of DeLVM's logits check: the same arrays on both sides, from a config and a seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.convert.parity.inputs import ParityRequest, Scope, prompt_ids, structured_pixels
from mindvlm.models.delvm.checkpoint_config import VQGAN_CLASS, from_published, vqgan_keys
from mindvlm.models.delvm.forms import PROJECTION
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.models.delvm.names import MODELS
from mindvlm.weights.recognise import native_view

NUM_ROWS = 4
"""Edge of the decoded picture in codes."""


def target_infos(path: str) -> dict[str, TensorInfo]:
    """Returns the native tensors of a target."""
    with open_checkpoint(path) as checkpoint:
        return dict(native_view(checkpoint, MODELS).infos)


def parity_config(request: ParityRequest, names: Collection[str]) -> DelvmModelConfig:
    """Returns the model config of a request and the native tensors `names`.

    Its parts are those of the target: the Hugging Face form of a whole training lacks the VQGAN. The form of the input
    is that of `names`. The tensors describe a VQGAN that no config describes.

    Raises:
        UserError: the config has a wrong key or value.
    """
    targets = target_infos(request.target)
    tensors = {name.removeprefix("vqgan."): info for name, info in targets.items() if name.startswith("vqgan.")}
    known = dict(request.config)
    if "_class_name" in known:
        return from_published(known)
    if "vq_config" not in known and tensors:
        known["vq_config"] = vqgan_keys(tensors, str(request.target))
    if not any(name.startswith("language_model.") for name in targets):
        return from_published({**known["vq_config"], "_class_name": VQGAN_CLASS})
    found = from_published(known)
    found.vqgan = found.vqgan if tensors else None
    found.input_embedding = "codebook" if PROJECTION in names else "table"
    return found


@dataclass(frozen=True)
class DelvmScope(Scope):
    """The parts of a DeLVM. A picture becomes codes, which need no features."""

    vqgan: bool
    language_model: bool
    images: bool = False


def scope_of(names: Collection[str], config: DelvmModelConfig) -> DelvmScope:
    """Returns the scope of a config."""
    return DelvmScope(config.vqgan is not None, config.language_model is not None)


@dataclass(frozen=True)
class DelvmInputs:
    """Inputs of one run; None for parts that the config does not describe.

    Attributes:
        pixels: (1, 3, height, width) float32 in 0..1.
        codes: (1, NUM_ROWS * NUM_ROWS) int32, of a picture to decode.
        input_ids: (1, L) int32.
    """

    pixels: np.ndarray | None
    codes: np.ndarray | None
    input_ids: np.ndarray | None


def make_inputs(config: DelvmModelConfig, scope: Scope, request: ParityRequest) -> DelvmInputs:
    """Returns the inputs; those of the decoder do not depend on whether there is a VQGAN."""
    pixels = codes = input_ids = None
    if config.language_model:
        input_ids = prompt_ids(np.random.default_rng(request.seed), config.language_model.vocab_size)
    if config.vqgan:
        generator = np.random.default_rng(request.seed + 1)
        size = config.vqgan.resolution
        pixels = 1 / (1 + np.exp(-structured_pixels(generator, size, size)))
        codes = generator.integers(config.vqgan.num_embeddings, size=(1, NUM_ROWS**2)).astype(np.int32)
    return DelvmInputs(pixels, codes, input_ids)
