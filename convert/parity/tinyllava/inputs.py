"""Scope and inputs of TinyLLaVA's logits check: the same arrays on both sides, from a config and a seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from mindvlm.convert.parity.inputs import ParityRequest, Scope, prompt_ids, structured_pixels
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.names import KINDS
from mindvlm.nn.config import height_and_width
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID

PARTS = {"vision_tower": "vision_tower", "mm_projector": "vision_tower", "language_model": "language_model"}
"""Parts of native names, and the field of a config that describes each. The learned row of tiled pictures is missing:
the stages have one picture, uncut."""


def parity_config(request: ParityRequest, names: Collection[str]) -> TinyLlavaModelConfig:
    """Returns the model config of the request's config.json, which has the tower's under `vision_config`.

    A SigLIP that was published alone may have its last layer, as `names` show, which a whole TinyLLaVA lacks.
    """
    dialect = next(kind.dialect for kind in KINDS if kind.name == request.model)
    found = from_hf_config(request.config, dialect=dialect)
    if found.language_model is None:
        last = f"vision_tower.encoder.layers.{found.vision_tower.num_hidden_layers}."
        found.vision_tower.num_hidden_layers += any(name.startswith(last) for name in names)
    return found


@dataclass(frozen=True)
class TinyLlavaScope(Scope):
    """The parts of a TinyLLaVA."""

    tower: bool
    connector: bool
    language_model: bool
    images: bool


def scope_of(names: Collection[str], config: TinyLlavaModelConfig) -> TinyLlavaScope:
    """Returns the scope of native names.

    Raises:
        UserError: the config does not describe one of the parts.
    """
    parts = {name.partition(".")[0] for name in names} & PARTS.keys()
    for part in sorted(parts):
        if getattr(config, PARTS[part]) is None:
            raise UserError(
                f"--verify logits: the config.json beside the weights does not describe their {part}; put that of the "
                "whole model there"
            )
    tower, connector = "vision_tower" in parts, "mm_projector" in parts
    has_connector = connector or config.connector.type == "identity"
    images = tower and has_connector and config.language_model is not None
    return TinyLlavaScope(tower, connector, "language_model" in parts, images)


@dataclass(frozen=True)
class TinyLlavaInputs:
    """Inputs of one run; None for parts that the config does not describe.

    Attributes:
        pixels: (1, 3, height, width) float32, normalised.
        features: (1, T, width) float32 as of the tower, for a connector without one.
        input_ids: (1, L) int32.
    """

    pixels: np.ndarray | None
    features: np.ndarray | None
    input_ids: np.ndarray | None


def make_inputs(config: TinyLlavaModelConfig, scope: Scope, request: ParityRequest) -> TinyLlavaInputs:
    """Returns the inputs; the prompt has the placeholders of one picture if `scope.images`."""
    generator = np.random.default_rng(request.seed)
    lm, vit = config.language_model, config.vision_tower
    pixels = features = input_ids = None
    if vit:
        pixels = structured_pixels(generator, *height_and_width(vit.image_size))
        shape = (1, vit.num_tokens - config.num_dropped_tokens, vit.hidden_size)
        features = generator.standard_normal(shape, dtype=np.float32)
    if lm:
        span = [PLACEHOLDER_ID] * config.image_token_len if scope.images else ()
        input_ids = prompt_ids(generator, lm.vocab_size, span=span)
    return TinyLlavaInputs(pixels, features, input_ids)
