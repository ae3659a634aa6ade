"""What a Vary model is fed when its conversion is proved: the same arrays on both sides, from a config and a seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindvlm.convert.reference.vary_layout import clip_config, has_vision, patch_grid, vocabulary_config

NUM_IDS_BEFORE_IMAGE, NUM_IDS_BEHIND_IMAGE = 21, 17
CONVOLUTIONS = ("vision_vocabulary.net_2.", "vision_vocabulary.net_3.")


@dataclass(frozen=True)
class VaryScope:
    """The stages that a set of tensors allows: a model may be there in parts.

    Attributes:
        clip, neck, connector, language_model: the part of that name is there.
        vocabulary: the neck and the two convolutions behind it.
        images: everything that turns a picture into embeddings.
    """

    clip: bool
    neck: bool
    vocabulary: bool
    connector: bool
    language_model: bool
    images: bool

    @classmethod
    def of(cls, names: Iterable[str], config: Mapping[str, Any]) -> VaryScope:
        """From native names, and a config.json that says whether the model has a CLIP tower at all."""
        names = tuple(names)

        def has(*prefixes: str) -> bool:
            return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

        clip, neck = has("vision_tower."), has("vision_vocabulary.neck.")
        vocabulary = neck and has(*CONVOLUTIONS)
        connector = has("mm_projector.") and (is_vary_tiny(config) or has("mm_projector_vary."))
        return cls(
            clip=clip,
            neck=neck,
            vocabulary=vocabulary,
            connector=connector,
            language_model=has("language_model."),
            images=connector and vocabulary and (is_vary_tiny(config) or clip),
        )


@dataclass(frozen=True)
class VaryInputs:
    """Inputs of one run, each made from a config as far as it describes the part; None where it does not.

    Attributes:
        clip_pixels, high_pixels: (1, 3, height, width) float32, normalised.
        features: (1, T, width) float32 as of CLIP and as of the vocabulary, for a connector without towers.
        input_ids: (1, L) int32.
    """

    clip_pixels: np.ndarray | None
    high_pixels: np.ndarray | None
    features: tuple[np.ndarray, np.ndarray] | None
    input_ids: np.ndarray | None


def vary_inputs(config: Mapping[str, Any], seed: int, *, image: bool) -> VaryInputs:
    """Make the inputs for an official config.json; `image` puts one picture's placeholders into the prompt."""
    generator = np.random.default_rng(seed)
    clip_pixels = high_pixels = features = input_ids = None
    if has_vision(config) and not is_vary_tiny(config):
        clip_pixels = structured_pixels(generator, *pixel_size(clip_config(config)))
    if has_vision(config) or "vision_high_config" in config:
        high_pixels = structured_pixels(generator, *pixel_size(vocabulary_config(config)))
        widths = clip_config(config)["hidden_size"], vocabulary_config(config)["net_3_channels"]
        shape = (1, num_image_tokens(config))
        features = tuple(generator.standard_normal((*shape, width), dtype=np.float32) for width in widths)
    if "vocab_size" in config:
        special = [config[key] for key in ("im_patch_token", "im_start_token", "im_end_token") if key in config]
        span = [special[1], *[special[0]] * num_image_tokens(config), special[2]] if image else ()
        input_ids = prompt_ids(generator, config["vocab_size"], special=special, span=span)
    return VaryInputs(clip_pixels, high_pixels, features, input_ids)


def vary_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as that of a Vary model: what a CLIP says of itself is what a Vary says under `vision_config`."""
    if config.get("model_type") == "clip_vision_model":
        return {"vision_config": dict(config)}
    if config.get("model_type") == "clip":
        return {"vision_config": dict(config.get("vision_config", {}))}
    return dict(config)


def is_vary_tiny(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes an OPT decoder: then there is one projector and no CLIP tower."""
    return "ffn_dim" in config


def structured_pixels(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A normalised picture (1, 3, height, width): waves, dark bars like lines of text, and noise.

    It looks different in every direction and at every place, so that swapped axes or positions do not cancel out.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / width
    channels = []
    for _ in range(3):
        fy, fx, phase = generator.uniform(0.5, 4, 3)
        channels.append(np.sin(2 * np.pi * (fy * y + fx * x * x) + phase) + 0.5 * x - 0.25 * y)
    bars = np.where((np.sin(2 * np.pi * 13 * y) > 0.4) & (np.sin(2 * np.pi * (37 * x + 5 * y)) > -0.3), -1.5, 0.0)
    pixels = np.stack(channels) + bars + generator.normal(0, 0.3, (3, height, width))
    return pixels[None].astype(np.float32)


def prompt_ids(
    generator: np.random.Generator, vocab_size: int, *, special: Sequence[int] = (), span: Sequence[int] = ()
) -> np.ndarray:
    """Text ids (1, L) int32, none of them `special`, with the span of a picture between them if there is one."""
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    text = generator.choice(ordinary, NUM_IDS_BEFORE_IMAGE + NUM_IDS_BEHIND_IMAGE)
    before, behind = text[:NUM_IDS_BEFORE_IMAGE], text[NUM_IDS_BEFORE_IMAGE:]
    return np.concatenate([before, span, behind])[None].astype(np.int32)


def num_image_tokens(config: Mapping[str, Any]) -> int:
    """Rows of features that a picture gives: the patches of the vocabulary after two convolutions of stride 2."""
    rows, columns = patch_grid(vocabulary_config(config))
    return math.ceil(rows / 4) * math.ceil(columns / 4)


def pixel_size(tower: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a tower's pictures, from its `image_size`."""
    size = tower["image_size"]
    return (size, size) if isinstance(size, int) else tuple(size)
