"""Shared by both sides of the logits check: the request, the compared parts, and pictures and prompts of a seed.

`mindvlm.convert.parity.<family>.inputs` defines, for both sides:

    parity_config(request, names)      the model config of a request and the native tensors `names`
    scope_of(names, config)            the `Scope`
    make_inputs(config, scope, request)    the inputs, with the ids (1, L) as `input_ids`
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

NUM_IDS_BEFORE_IMAGE, NUM_IDS_BEHIND_IMAGE = 21, 17


@dataclass(frozen=True, kw_only=True)
class ParityRequest:
    """The settings of a comparison; only JSON types, since the processes read it from a file.

    Attributes:
        family, model: names of the model and of its family.
        source_paths, merge_lora, only: as for `open_native`.
        dtype: "keep", or the dtype that the conversion rounded to; the reference rounds its weights alike.
        target: the file or folder written.
        config: the model's config.json.
        seed: of pixels and prompt.
        num_tokens: number of greedy tokens to decode.
    """

    family: str
    model: str
    source_paths: list[str]
    target: str
    config: dict[str, Any]
    merge_lora: str | None = None
    only: str | None = None
    dtype: str = "keep"
    seed: int = 0
    num_tokens: int = 32


class Scope:
    """The parts of a model that a set of tensors has, and so the stages that can be compared.

    Attributes:
        language_model: the decoder is present.
        images: everything that turns a picture into embeddings is.
    """

    language_model: bool
    images: bool

    @property
    def absent(self) -> tuple[str, ...]:
        """Prefixes of parameters whose tensors are missing although others of their part are there."""
        return ()


def inputs_of(family: str) -> ModuleType:
    """Returns the family's module, see above."""
    return importlib.import_module(f"{__package__}.{family}.inputs")


def structured_pixels(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a normalised picture (1, 3, height, width): waves, dark bars like lines of text, and noise.

    It differs in every direction and at every place, so that swapped axes or positions do not cancel out.
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
    """Returns text ids (1, L) int32, none of them `special`, around the span of a picture."""
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    text = generator.choice(ordinary, NUM_IDS_BEFORE_IMAGE + NUM_IDS_BEHIND_IMAGE)
    before, behind = text[:NUM_IDS_BEFORE_IMAGE], text[NUM_IDS_BEFORE_IMAGE:]
    return np.concatenate([before, span, behind])[None].astype(np.int32)
