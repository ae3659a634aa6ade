"""The interface of a family that trains on data of its own kind, and the inputs and figures that all jobs share.

B rows, L tokens, N views, C channels, H and W of a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from mindspore import nn


@dataclass(frozen=True)
class PassInputs:
    """Inputs of a model in one pass.

    Attributes:
        arrays: name -> array, in the order of the model's arguments. The rotary frequencies of the decoder follow
            `labels` in the arguments and are not part of the batch. Float arrays are converted to the model's dtype.
        num_tokens: tokens that are not padding.
        origins: origin of each row.
    """

    arrays: dict[str, np.ndarray]
    num_tokens: int
    origins: list[str]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the arrays; each has a graph."""
        return tuple(array.shape for array in self.arrays.values())


def text_inputs(
    input_ids: np.ndarray,
    labels: np.ndarray,
    sources: np.ndarray,
    pixels: tuple[np.ndarray, ...],
    num_tokens: int,
    origins: list[str],
    choices: np.ndarray | None = None,
) -> PassInputs:
    """Returns the inputs of an `ImageTextModel`.

    Args:
        input_ids, labels: (B, L) int32.
        sources: (B, L) int32, see `SampleBatch`.
        pixels: (N, C, H, W) float32 of each vision branch.
        num_tokens, origins: see `PassInputs`.
        choices: (B, 1 + P, L) int32, see `SampleBatch`; None if the model takes none.
    """
    arrays = {"input_ids": input_ids, "labels": labels}
    arrays |= {f"pixels.{branch}": array for branch, array in enumerate(pixels)}
    arrays |= {"sources": sources} if choices is None else {"sources": sources, "choices": choices}
    return PassInputs(arrays, num_tokens, origins)


class TrainingData(Protocol):
    """The batches of one process in a fixed order, from any step on.

    Attributes:
        rows_per_epoch: None for endless data.
        identity: values that must be equal for a run to resume, by name.
        num_skipped: unusable samples so far.
        figures: position in the data, for the progress line.
        state: position between two steps, for JSON.
    """

    rows_per_epoch: int | None
    identity: dict[str, Any]
    num_skipped: int
    figures: dict[str, float]
    state: dict[str, Any]

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        """Starts the processes that make the batches from `step` on."""

    def take(self) -> list[PassInputs]:
        """Returns the passes of the next step."""

    def observe(self, loss: float) -> str | None:
        """Receives the step loss; returns an optional log message."""

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Merges the states of all replicas into one from which each replica can resume."""

    def close(self) -> None:
        """Stops the worker processes."""


@dataclass(frozen=True)
class Reading:
    """One answer: the origin of the question, the expected text and the generated text."""

    origin: str
    reference: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """Figures by name, and the answers they summarize."""

    figures: dict[str, float]
    readings: list[Reading] = field(default_factory=list)


class Evaluator(Protocol):
    """Evaluates the held-out samples of a job."""

    def evaluate(self) -> Evaluation: ...


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """What a pass holds, beside the trained model's weights, gradients and optimizer's state.

    Attributes:
        num_rows, length: of the decoder's input; no rows without a decoder.
        frozen: further weights in bytes.
        towers: peak of the activations in bytes while the decoder does not run.
        beside: activations in bytes beside those of the decoder.
        uncounted: what is left out because its sizes are unknown, for a message; empty if nothing is.
    """

    num_rows: int = 0
    length: int = 0
    frozen: int = 0
    towers: int = 0
    beside: int = 0
    uncounted: str = ""


@dataclass(frozen=True, kw_only=True)
class OwnTraining:
    """How a family trains whose data are not questions and answers about images.

    Attributes:
        sections: returns name -> dataclass of the job's sections that belong to the family; called with the job as a
            mapping. `data` is one of them; its dataclass has `batch_size`, the rows of a device in one pass. A
            dataclass with paths has `resolve_paths(path of the job)`. The dataclass of `evaluation` has `FIGURES`, the
            names by which the best checkpoint can be selected (lower is better).
        open_data: opens the batches of a process; called with (section data, run config, seed=..., share=...), where
            `share` has `shard`, `num_shards` and `num_passes`.
        make_trained: returns the Cell to train, *arguments of a pass -> sum of the losses, their number; called with
            (model, run config, sections by name, context), when the model has its weights. Parameters that the Cell
            adds to the model are in no checkpoint and must not train. None trains the model itself.
        frozen_weights: returns what -> checkpoint of the weights that the Cell adds to the model, which a resumed run
            must find unchanged; called with (run config, sections by name).
        pass_memory: estimates the memory of a pass; called with (run config, sections by name, item_size).
        open_evaluator: opens the evaluation of the job; called with (section evaluation, section data, run config,
            model, graph_mode=...).
        free_keys: dotted keys of the job that may change when a run resumes.
    """

    sections: Callable[[dict[str, Any]], Mapping[str, type]]
    open_data: Callable[..., TrainingData]
    pass_memory: Callable[..., PassMemory]
    make_trained: Callable[..., nn.Cell] | None = None
    frozen_weights: Callable[..., Mapping[str, str]] | None = None
    open_evaluator: Callable[..., Evaluator] | None = None
    free_keys: frozenset[str] = frozenset()
