"""Workloads of the benchmark: a model of known sizes, its files, a prompt with one image. Imports no framework.

`mindvlm.tools.benchmarks.<family>` defines the workloads of a family: MODELS, a `BenchmarkModel` by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mindvlm.checkpoint import CastSource, TensorSource, open_checkpoint, write_checkpoint
from mindvlm.convert.random_weights import RandomSource
from mindvlm.core.errors import UserError

STORED_DTYPE, BFLOAT16_BYTES, FLOAT32_BYTES = "bfloat16", 2, 4
GGUF_BYTES = {"bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_K": 144 / 256}
"""Bytes of a value in the formats of GGUF files."""


@dataclass(frozen=True)
class Workload(ABC):
    """One image, one prompt, `num_tokens` greedy tokens, on random weights of `seed`.

    Attributes:
        config: a config.json as a dict.
        checkpoint: file of the weights in bfloat16 that `write_checkpoint` has written; None for float32 weights that
            are made while they are read.
        family: the family's name.
        decode_prefixes: prefixes of the tensors that a decode step reads: the blocks, the last norm and the head.
        architecture: llama.cpp's name of the decoder.
    """

    config: dict[str, Any]
    seed: int
    num_tokens: int
    checkpoint: str | None = field(default=None, kw_only=True)

    family: ClassVar[str]
    architecture: ClassVar[str]
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
    def reference_type(self) -> Any:
        """Returns the class of the torch reference. Imports torch."""

    def reference(self, dtype: Any) -> Any:
        """Returns the torch reference with the weights, in a torch dtype. Imports torch."""
        with self.source() as source:
            return self.reference_type().from_source(self.model_config, source, dtype=dtype)

    def source(self) -> TensorSource:
        """Opens the weights under their official names."""
        if self.checkpoint:
            return open_checkpoint(self.checkpoint, require_finite=True)
        return RandomSource(self.shapes, self.seed)

    def with_files(self, folder: Path, gguf_dtypes: Iterable[str]) -> Workload:
        """Writes the checkpoint and the GGUF files of these formats, unless they exist; returns the workload on them.

        Raises:
            UserError: there is no room for them.
        """
        sizes = json.dumps(self.config, sort_keys=True).encode()
        name = f"{self.family}-{hashlib.blake2b(sizes, digest_size=4).hexdigest()}-{self.seed}"
        path = folder / f"{name}.safetensors"
        stored = dataclasses.replace(self, checkpoint=str(path))
        missing = [dtype for dtype in gguf_dtypes if not stored.gguf_file(dtype).exists()]
        needed = self.num_parameters * (BFLOAT16_BYTES * (not path.exists()) + sum(GGUF_BYTES[one] for one in missing))
        if needed > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"{folder}: the files of the benchmark need {needed / 1e9:.1f} GB but {free / 1e9:.1f} GB are free; "
                "give another --folder, or fewer contenders"
            )
        if not path.exists():
            write_checkpoint(path, CastSource(RandomSource(self.shapes, self.seed), STORED_DTYPE))
        if missing:
            # a package of the extra `benchmark`
            from mindvlm.tools.benchmarks.gguf_file import write_gguf
        for dtype in missing:
            with stored.source() as source:
                write_gguf(
                    stored.gguf_file(dtype),
                    source,
                    self.model_config.language_model,
                    architecture=self.architecture,
                    dtype=dtype,
                )
        return stored

    def gguf_file(self, dtype: str) -> Path:
        """Returns the path of the decoder in a format of llama.cpp, beside the checkpoint."""
        return Path(self.checkpoint).with_suffix(f".{dtype}.gguf")

    @property
    def pixels(self) -> tuple[np.ndarray, ...]:
        """Normalised noise for every tower: (1, 3, height, width) float32 arrays."""
        generator = np.random.default_rng(self.seed)
        return tuple(generator.standard_normal(shape, dtype=np.float32) for shape in self.pixel_shapes)

    @property
    def total_length(self) -> int:
        """Prompt and answer together, in tokens."""
        return self.prompt_ids.shape[1] + self.num_tokens

    def text_ids(self, num_rows: int, length: int) -> np.ndarray:
        """Returns prompts of random text without images, (B, L) int32."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, self.config["vocab_size"] // 2, (num_rows, length)).astype(np.int32)

    @property
    def num_parameters(self) -> int:
        """Of the whole model, towers included."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def parameter_bytes(self) -> int:
        """All weights in float32."""
        return FLOAT32_BYTES * self.num_parameters


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
