"""Workloads of the benchmark: a model of known sizes, a prompt with one image, pixels. Imports no framework.

`mindvlm.tools.benchmarks.<family>` defines the workloads of a family: MODELS, a `BenchmarkModel` by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class Workload(ABC):
    """One image, one prompt, `num_tokens` greedy tokens, on random float32 weights of `seed`.

    Attributes:
        config: a config.json as a dict.
        family: the family's name.
        decode_prefixes: prefixes of the tensors that a decode step reads: the blocks, the last norm and the head.
    """

    config: dict[str, Any]
    seed: int
    num_tokens: int

    family: ClassVar[str]
    decode_prefixes: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
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
    def model_config(self) -> Any:
        """The family's model config that `config` describes."""

    @abstractmethod
    def reference(self) -> Any:
        """Returns the torch reference with the random weights. Imports torch."""

    @property
    def pixels(self) -> tuple[np.ndarray, ...]:
        """Normalised noise for every tower: (1, 3, height, width) float32 arrays."""
        generator = np.random.default_rng(self.seed)
        return tuple(generator.standard_normal(shape, dtype=np.float32) for shape in self.pixel_shapes)

    @property
    def total_length(self) -> int:
        """Prompt and answer together, in tokens."""
        return self.prompt_ids.shape[1] + self.num_tokens

    @property
    def parameter_bytes(self) -> int:
        """All weights in float32."""
        return BYTES_PER_VALUE * sum(map(math.prod, self.shapes.values()))

    @property
    def decode_bytes(self) -> int:
        """The least that one decode step must read: blocks, head, and the filled KV cache at half the answer."""
        weights = sum(math.prod(shape) for name, shape in self.shapes.items() if name.startswith(self.decode_prefixes))
        filled = self.total_length - self.num_tokens // 2
        decoder = self.model_config.language_model
        key_width = decoder.num_key_value_heads * decoder.head_dim
        return BYTES_PER_VALUE * (weights + 2 * decoder.num_hidden_layers * key_width * filled)


@dataclass(frozen=True)
class BenchmarkModel:
    """A model of the benchmark.

    Attributes:
        workload: the type of its workload.
        config: makes its config.json.
        is_small: whether it runs in seconds.
        training: makes a workload of the training benchmark, called with `seed`, `recompute` and perhaps `num_layers`;
            None if the model is not trained there.
        trained: describes the model that the training benchmark trains.
    """

    workload: type[Workload]
    config: Callable[[], dict[str, Any]]
    is_small: bool = False
    training: Callable[..., Any] | None = None
    trained: str = ""


def prompt(before: str, span: list[int], behind: str, *, vocab_size: int) -> np.ndarray:
    """Returns the ids (1, L) int32 of the text before and behind the span of an image."""
    first, last = ([int(token) % vocab_size for token in text.split()] for text in (before, behind))
    return np.array([[*first, *span, *last]], np.int32)


def benchmark_models(families: list[str]) -> dict[str, BenchmarkModel]:
    """Returns the models that the benchmark can measure, by name."""
    modules = [name for family in families if importlib.util.find_spec(name := _module(family))]
    return {name: model for module in modules for name, model in importlib.import_module(module).MODELS.items()}


def workload_record(workload: Workload) -> dict[str, Any]:
    """Returns plain values that `read_workload` makes the same workload of."""
    return {"family": workload.family, "type": type(workload).__name__, "fields": dataclasses.asdict(workload)}


def read_workload(record: dict[str, Any]) -> Any:
    """Returns the workload of a `workload_record`."""
    return getattr(importlib.import_module(_module(record["family"])), record["type"])(**record["fields"])


def _module(family: str) -> str:
    return f"{__package__}.{family}"
