"""Scope and inputs of Vary's logits check: the same arrays on both sides, from a config and a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mindvlm.convert.parity.inputs import ParityRequest, Scope, prompt_ids, structured_pixels
from mindvlm.models.vary.hf_config import ImageTokens, from_hf_config
from mindvlm.models.vary.model_config import VaryModelConfig, num_vocabulary_tokens
from mindvlm.nn.config import height_and_width

CONVOLUTIONS = ("vision_vocabulary.net_2.", "vision_vocabulary.net_3.")


@dataclass(frozen=True)
class VaryScope(Scope):
    """The parts of a Vary. `vocabulary` is the neck and the two convolutions behind it."""

    clip: bool
    neck: bool
    vocabulary: bool
    connector: bool
    language_model: bool
    images: bool

    @property
    def absent(self) -> tuple[str, ...]:
        """The convolutions, without which a vocabulary may come; its neck does not depend on them."""
        return () if self.vocabulary else CONVOLUTIONS


def scope_of(names: Iterable[str], config: VaryModelConfig) -> VaryScope:
    """Returns the scope of native names, and of a config that shows whether the model has a CLIP tower."""
    names = tuple(names)

    def has(*prefixes: str) -> bool:
        return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    clip, neck = has("vision_tower."), has("vision_vocabulary.neck.")
    vocabulary = neck and has(*CONVOLUTIONS)
    connector = has("mm_projector.") and (config.is_tiny or has("mm_projector_vary."))
    return VaryScope(
        clip=clip,
        neck=neck,
        vocabulary=vocabulary,
        connector=connector,
        language_model=has("language_model."),
        images=connector and vocabulary and (config.is_tiny or clip),
    )


@dataclass(frozen=True)
class VaryInputs:
    """Inputs of one run; None for parts that the config does not describe.

    Attributes:
        clip_pixels, high_pixels: (1, 3, height, width) float32, normalised.
        features: (1, T, width) float32 as of each tower of the config, for a connector without towers.
        input_ids: (1, L) int32.
    """

    clip_pixels: np.ndarray | None
    high_pixels: np.ndarray | None
    features: tuple[np.ndarray, ...]
    input_ids: np.ndarray | None


def make_inputs(config: VaryModelConfig, scope: Scope, request: ParityRequest) -> VaryInputs:
    """Returns the inputs for a model; the prompt has the placeholders of one picture if `scope.images`."""
    generator, tokens = np.random.default_rng(request.seed), ImageTokens.of(request.config)
    lm, vit, sam = config.language_model, config.vision_tower, config.vision_vocabulary
    clip_pixels = high_pixels = input_ids = None
    widths = []
    if vit:
        clip_pixels = structured_pixels(generator, *height_and_width(vit.image_size))
        widths.append(vit.hidden_size)
    if sam:
        high_pixels = structured_pixels(generator, *height_and_width(sam.image_size))
        widths.append(sam.net_3_channels)
    shape = (1, config.image_token_len)
    features = tuple(generator.standard_normal((*shape, width), dtype=np.float32) for width in widths)
    if lm:
        special = [tokens.patch, tokens.start, tokens.end]
        span = [tokens.start, *[tokens.patch] * num_vocabulary_tokens(sam), tokens.end] if scope.images else ()
        input_ids = prompt_ids(generator, lm.vocab_size, special=special, span=span)
    return VaryInputs(clip_pixels, high_pixels, features, input_ids)


def parity_config(request: ParityRequest, names: Iterable[str]) -> VaryModelConfig:
    """Returns the model config of the request's config.json: of a Vary, or of a CLIP, which is then the only part."""
    config = request.config
    if config.get("model_type") == "clip_vision_model":
        return from_hf_config({"vision_config": dict(config)})
    if config.get("model_type") == "clip":
        return from_hf_config({"vision_config": dict(config.get("vision_config", {}))})
    return from_hf_config(config)
