"""The stages of a model, and how far apart the outputs of both sides are; reads blocks of bounded size."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mindvlm.checkpoint import Checkpoint
from mindvlm.core.errors import UserError

GREEDY_IDS, STEP_LOGITS = "greedy_ids", "step_logits"
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Side:
    """One process: framework and device in words, seconds, peak resident bytes."""

    framework: str
    seconds: float
    peak_memory_bytes: int

    @classmethod
    def of(cls, outputs: Checkpoint) -> Side:
        """Reads the metadata that the process wrote beside its outputs."""
        text = outputs.metadata
        return cls(text["framework"], float(text["seconds"]), int(text["peak_memory_bytes"]))

    def describe(self) -> str:
        return f"{self.framework}: {self.seconds:.0f} s, peak memory {self.peak_memory_bytes / 1e9:.1f} GB"


@dataclass(frozen=True)
class Stage:
    """A compared intermediate result: its title, the tensors that enter there (in words), and whether the first axis
    of the output counts layers, which are then compared one by one."""

    title: str
    tensors: str
    stacked: bool = False


TOWER_STAGES = {
    "tower_features": Stage("vision features", "vision_tower.*"),
    "tower_last_hidden": Stage("vision last layer", "vision_tower.encoder.layers.* behind the features"),
    "tower_pooled": Stage("vision last norm", "vision_tower.post_layernorm.*"),
}


def decoder_stages(*, before: str = "", head: str = "language_model.lm_head.*") -> dict[str, Stage]:
    """Returns the stages of a decoder.

    Args:
        before: tensors that enter before the layers, in words.
        head: tensors of the head, in words.
    """
    return {
        "merged_embeddings": Stage("merged embeddings", "language_model.embed_tokens.*"),
        "layers": Stage("decoder layers", f"language_model.{before}layers.*, norm.*", stacked=True),
        "logits": Stage("logits", head),
        STEP_LOGITS: Stage("logits with cache", "those of the decoder, used with its cache"),
    }


def stages_of(family: str, model: str) -> Mapping[str, Stage]:
    """Returns the stages of a model by key, in order of computation: its entry in `mindvlm.convert.parity.<family>`.

    Raises:
        UserError: there is none.
    """
    module = f"{__package__}.{family}"
    models = importlib.import_module(module).MODELS if importlib.util.find_spec(module) else {}
    if model not in models:
        known = f"; expected one of: {', '.join(models)}" if models else f"; no model of the family {family!r} has it"
        raise UserError(f"--verify logits is not defined for {model!r}{known}")
    return models[model]


@dataclass(frozen=True)
class StageResult:
    """The comparison of one stage.

    Attributes:
        key, title, tensors: see `Stage`.
        shape: of the reference's output, or of the only output.
        relative_error: Frobenius norm of the difference over that of the reference; the largest of all layers.
        max_difference: largest absolute difference of two elements.
        passed: whether the relative error is within the bound.
        note: the layers beyond the bound, or why the outputs cannot be compared; may be "".
    """

    key: str
    title: str
    tensors: str
    shape: tuple[int, ...]
    relative_error: float
    max_difference: float
    passed: bool
    note: str = ""

    def finding(self, bound: float) -> str:
        """Returns the error and the note in words."""
        error = f"relative error {self.relative_error:.1e}, allowed {bound:.0e}"
        return ", ".join(filter(None, (error, self.note)))


@dataclass(frozen=True)
class Token:
    """One greedy step, after both sides have read the same tokens.

    Attributes:
        expected, actual: the ids chosen by the reference and by our model.
        gap: the reference's logit of `expected` minus that of `actual`.
        max_difference: largest difference of the two sides' logits at this step.
        tie: the ids differ though the logits agree within the bound: rounding decided.
    """

    expected: int
    actual: int
    gap: float
    max_difference: float
    tie: bool

    @property
    def equal(self) -> bool:
        return self.expected == self.actual


def compare_stage(key: str, stage: Stage, expected: Checkpoint, actual: Checkpoint, bound: float) -> StageResult:
    """Compares one output of both sides; an output that is missing on a side, or of another shape, fails."""
    wanted, found = expected.infos.get(key), actual.infos.get(key)
    info = wanted or found
    note = ""
    if wanted is None or found is None:
        note = "only in the source" if found is None else "only in the target"
    elif wanted.shape != found.shape:
        note = f"shape {list(found.shape)} in the target"
    if note:
        return StageResult(key, stage.title, stage.tensors, info.shape, math.inf, math.inf, False, note)
    num_rows = info.shape[0] if stage.stacked else 1
    size = info.num_elements // num_rows
    rows = [_compare_range(key, row * size, (row + 1) * size, expected, actual) for row in range(num_rows)]
    beyond = [row for row, (error, _) in enumerate(rows) if error > bound]
    if stage.stacked and beyond:
        note = f"from layer {beyond[0]} on"
    worst, largest = max(error for error, _ in rows), max(difference for _, difference in rows)
    return StageResult(key, stage.title, stage.tensors, info.shape, worst, largest, not beyond, note)


def _compare_range(key: str, start: int, stop: int, expected: Checkpoint, actual: Checkpoint) -> tuple[float, float]:
    """Returns the relative error and the largest difference of elements [start, stop)."""
    difference = total = largest = 0.0
    for first in range(start, stop, _CHUNK_ELEMENTS):
        last = min(first + _CHUNK_ELEMENTS, stop)
        reference = expected.read_range(key, first, last).astype(np.float64)
        delta = actual.read_range(key, first, last) - reference
        difference += float(delta @ delta)
        total += float(reference @ reference)
        # a NaN on either side must win
        largest = float(np.maximum(largest, np.abs(delta).max()))
    return _ratio(math.sqrt(difference), math.sqrt(total)), largest


def compare_tokens(expected: Checkpoint, actual: Checkpoint, bound: float) -> tuple[Token, ...]:
    """Compares the ids that both sides chose at each step; returns nothing if a side has none."""
    if GREEDY_IDS not in expected.infos or GREEDY_IDS not in actual.infos:
        return ()
    tokens = []
    vocab_size = expected.infos[STEP_LOGITS].shape[-1]
    pairs = zip(expected.read(GREEDY_IDS).data, actual.read(GREEDY_IDS).data, strict=True)
    for step, (wanted, found) in enumerate(pairs):
        start, stop = step * vocab_size, (step + 1) * vocab_size
        reference = expected.read_range(STEP_LOGITS, start, stop).astype(np.float64)
        delta = actual.read_range(STEP_LOGITS, start, stop) - reference
        close = _ratio(float(np.linalg.norm(delta)), float(np.linalg.norm(reference))) <= bound
        gap = float(reference[wanted] - reference[found])
        different = int(wanted) != int(found)
        tokens.append(Token(int(wanted), int(found), gap, float(np.abs(delta).max()), different and close))
    return tuple(tokens)


def _ratio(difference: float, total: float) -> float:
    """Returns the relative error; equal zeros have none, and NaN counts as infinite."""
    if difference == 0:
        return 0.0
    ratio = difference / total if total else math.inf
    return ratio if math.isfinite(ratio) else math.inf
