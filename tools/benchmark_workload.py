"""What the benchmark computes: a model of known sizes, a prompt with one image, pixels. Imports no framework."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindvlm.convert.reference.vary_layout import (
    clip_config,
    parameter_shapes,
    patch_grid,
    vary_toy_config,
    vocabulary_config,
)

# "Provide the ocr results of this image." in the released template: what stands before and behind the image span.
TEXT_BEFORE = "151644 8948 198 2610 1265 1795 279 11221 15516 323 10339 697 11253 304 7716 13 151645 151644 872 198"
TEXT_BEHIND = "198 60424 279 297 5082 3059 315 419 2168 13 151645 151644 77091 198"
BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class Workload:
    """One image, one prompt, `num_tokens` greedy tokens, on random float32 weights of `seed`.

    `config` is an official config.json of Vary-toy as a dict.
    """

    config: dict[str, Any]
    seed: int
    num_tokens: int

    @property
    def prompt_ids(self) -> np.ndarray:
        """(1, L) int32; 292 ids for the released sizes. A smaller vocabulary gets the text ids modulo its size."""
        config = self.config
        before, behind = (
            [int(token) % config["im_start_token"] for token in text.split()] for text in (TEXT_BEFORE, TEXT_BEHIND)
        )
        span = [config["im_start_token"], *[config["im_patch_token"]] * config["image_token_len"]]
        return np.array([[*before, *span, config["im_end_token"], *behind]], np.int32)

    @property
    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised noise for both towers: two (1, 3, height, width) float32 arrays."""
        generator = np.random.default_rng(self.seed)
        shapes = [_pixel_shape(size) for size in (clip_config(self.config), vocabulary_config(self.config))]
        clip, high = (generator.standard_normal(shape, dtype=np.float32) for shape in shapes)
        return clip, high

    @property
    def num_slots(self) -> int:
        """Prompt and answer together, in tokens."""
        return self.prompt_ids.shape[1] + self.num_tokens

    @property
    def parameter_bytes(self) -> int:
        """All weights in float32."""
        return BYTES_PER_VALUE * sum(math.prod(shape) for shape in parameter_shapes(self.config).values())

    @property
    def decode_bytes(self) -> int:
        """What one decode step must read at least: decoder blocks, head, and the filled KV cache at half the answer."""
        config = self.config
        weights = sum(
            math.prod(shape)
            for name, shape in parameter_shapes(config).items()
            if name.startswith(("transformer.h.", "transformer.ln_f", "lm_head"))
        )
        width = config["num_attention_heads"] * config["kv_channels"]
        filled = self.num_slots - self.num_tokens // 2
        return BYTES_PER_VALUE * (weights + 2 * config["num_hidden_layers"] * width * filled)


def smoke_config() -> dict[str, Any]:
    """The layout of Vary-toy with numbers so small that the whole benchmark takes seconds."""
    return vary_toy_config() | {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 32,
        "vocab_size": 256,
        "image_token_len": 16,
        "im_start_token": 253,
        "im_end_token": 254,
        "im_patch_token": 255,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        "vision_high_config": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "global_attn_indexes": [1],
            "image_size": 256,
            "out_chans": 16,
            "net_2_channels": 24,
            "net_3_channels": 32,
        },
    }


MODELS: dict[str, Callable[[], dict[str, Any]]] = {"vary_toy": vary_toy_config, "smoke": smoke_config}


def _pixel_shape(config: dict[str, Any]) -> tuple[int, int, int, int]:
    rows, columns = patch_grid(config)
    return 1, 3, rows * config["patch_size"], columns * config["patch_size"]
