"""What the benchmark computes: a model of known sizes, a prompt with one image, pixels. Imports no framework."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mindvlm.convert.reference import tinyllava_layout, vary_layout
from mindvlm.convert.reference.tinyllava_form import bench_form, num_image_tokens
from mindvlm.convert.reference.vary_layout import Shapes, clip_config, patch_grid, vary_toy_config, vocabulary_config
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID

BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class Workload(ABC):
    """One image, one prompt, `num_tokens` greedy tokens, on random float32 weights of `seed`.

    A subclass says the rest for one family.

    Attributes:
        config: a config.json as a dict.
        family: of `mindvlm.families`.
        head: prefixes of the tensors that a decode step reads, the blocks, the last norm and the head.
    """

    config: dict[str, Any]
    seed: int
    num_tokens: int

    family: ClassVar[str]
    head: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Official name -> shape of every tensor."""

    @property
    @abstractmethod
    def placeholder_id(self) -> int:
        """The token that stands for one row of the image's features."""

    @property
    @abstractmethod
    def prompt_ids(self) -> np.ndarray:
        """(1, L) int32. A smaller vocabulary than the released one gets the text ids modulo its size."""

    @property
    @abstractmethod
    def pixel_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(1, 3, height, width) of every tower."""

    @property
    @abstractmethod
    def key_width(self) -> int:
        """Channels of the keys of one token in one layer."""

    @property
    def pixels(self) -> tuple[np.ndarray, ...]:
        """Normalised noise for every tower: (1, 3, height, width) float32 arrays."""
        generator = np.random.default_rng(self.seed)
        return tuple(generator.standard_normal(shape, dtype=np.float32) for shape in self.pixel_shapes)

    @property
    def num_slots(self) -> int:
        """Prompt and answer together, in tokens."""
        return self.prompt_ids.shape[1] + self.num_tokens

    @property
    def parameter_bytes(self) -> int:
        """All weights in float32."""
        return BYTES_PER_VALUE * sum(map(math.prod, self.shapes.values()))

    @property
    def decode_bytes(self) -> int:
        """What one decode step must read at least: decoder blocks, head, and the filled KV cache at half the answer."""
        weights = sum(math.prod(shape) for name, shape in self.shapes.items() if name.startswith(self.head))
        filled = self.num_slots - self.num_tokens // 2
        return BYTES_PER_VALUE * (weights + 2 * self.config["num_hidden_layers"] * self.key_width * filled)


class VaryWorkload(Workload):
    """A Vary-toy, asked "Provide the ocr results of this image." in the released template: 292 tokens."""

    family = "vary"
    head = ("transformer.h.", "transformer.ln_f", "lm_head")
    before = "151644 8948 198 2610 1265 1795 279 11221 15516 323 10339 697 11253 304 7716 13 151645 151644 872 198"
    behind = "198 60424 279 297 5082 3059 315 419 2168 13 151645 151644 77091 198"

    @cached_property
    def shapes(self) -> Shapes:
        return vary_layout.parameter_shapes(self.config)

    @property
    def placeholder_id(self) -> int:
        return self.config["im_patch_token"]

    @property
    def prompt_ids(self) -> np.ndarray:
        config = self.config
        span = [config["im_start_token"], *[self.placeholder_id] * config["image_token_len"], config["im_end_token"]]
        return prompt(self.before, span, self.behind, vocab_size=config["im_start_token"])

    @property
    def pixel_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        return tuple(_pixel_shape(size) for size in (clip_config(self.config), vocabulary_config(self.config)))

    @property
    def key_width(self) -> int:
        return self.config["num_attention_heads"] * self.config["kv_channels"]


class TinyLlavaWorkload(Workload):
    """A TinyLLaVA, asked "What is unusual about this image?" in the template `v1`: 778 tokens for 729 of the image.

    `config` is in the form of `tinyllava_form.bench_form`.
    """

    family = "tinyllava"
    head = ("model.layers.", "model.norm.", "model.final_layernorm.", "lm_head")
    before = (
        "1 319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 "
        "1248 568 6089 304 278 1404 29915 29879 5155 29889 3148 1001 29901 29871"
    )
    behind = "29871 13 5618 338 22910 1048 445 1967 29973 319 1799 9047 13566 29901"

    @cached_property
    def shapes(self) -> Shapes:
        return tinyllava_layout.parameter_shapes(self.config, self.config["dialect"])

    @property
    def placeholder_id(self) -> int:
        return PLACEHOLDER_ID

    @property
    def prompt_ids(self) -> np.ndarray:
        span = [PLACEHOLDER_ID] * num_image_tokens(self.config)
        return prompt(self.before, span, self.behind, vocab_size=self.config["vocab_size"])

    @property
    def pixel_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        side = tinyllava_layout.tower_sizes(self.config["vision_config"])["image_size"]
        return ((1, 3, side, side),)

    @property
    def key_width(self) -> int:
        config = self.config
        return config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]


def prompt(before: str, span: list[int], behind: str, *, vocab_size: int) -> np.ndarray:
    """Ids (1, L) int32 of the text before and behind the span of an image."""
    first, last = ([int(token) % vocab_size for token in text.split()] for text in (before, behind))
    return np.array([[*first, *span, *last]], np.int32)


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


def tinyllava_config() -> dict[str, Any]:
    """The released TinyLLaVA-1.5B."""
    return bench_form(tinyllava_layout.llama_config(), "llama")


def tinyllava_smoke_config() -> dict[str, Any]:
    """The layout of TinyLLaVA-1.5B with such numbers."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return tinyllava_config() | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "vision_config": {**tinyllava_layout.SIGLIP_DEFAULTS, **tower, "image_size": 60},
    }


@dataclass(frozen=True)
class BenchmarkModel:
    """A model of the benchmark: its kind of workload, and what makes its config."""

    kind: type[Workload]
    config: Callable[[], dict[str, Any]]


MODELS = {
    "vary_toy": BenchmarkModel(VaryWorkload, vary_toy_config),
    "smoke": BenchmarkModel(VaryWorkload, smoke_config),
    "tinyllava_1_5b": BenchmarkModel(TinyLlavaWorkload, tinyllava_config),
    "tinyllava_smoke": BenchmarkModel(TinyLlavaWorkload, tinyllava_smoke_config),
}


def make_workload(model: str, *, seed: int, num_tokens: int) -> Workload:
    """The workload of a key of `MODELS`."""
    return MODELS[model].kind(MODELS[model].config(), seed, num_tokens)


def _pixel_shape(config: dict[str, Any]) -> tuple[int, int, int, int]:
    rows, columns = patch_grid(config)
    return 1, 3, rows * config["patch_size"], columns * config["patch_size"]
