"""Verifies that a converted model computes the same as its source: `compare_logits`.

The torch reference reads the source, the MindSpore model reads the target as `predict` would; both get the same seeded
inputs, each in its own process and one after the other, so that only one of them holds the weights. Comparing the
output of every stage catches errors that no comparison of tensors can: a rule that is wrong in both directions, or a
model that uses a tensor in the wrong place. It cannot catch a wrong key bias of an attention without rotary positions,
which shifts all scores of a query alike, so no output depends on it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import open_checkpoint
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.process import run_child
from mindvlm.convert.parity.stages import (
    Side,
    Stage,
    StageResult,
    Token,
    compare_stage,
    compare_tokens,
    stages_of,
)
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import format_table

BOUND = 1e-5
"""The largest relative Frobenius error of a stage that passes."""


@dataclass(frozen=True)
class ParityReport:
    """The result of a comparison.

    Attributes:
        stages: in order of computation, without those that the tensors do not allow.
        tokens: one per greedy step; none without a language model.
        bound: the allowed relative error.
        reference, mindspore: duration and memory of each side.
    """

    stages: tuple[StageResult, ...]
    tokens: tuple[Token, ...]
    bound: float
    reference: Side
    mindspore: Side

    @property
    def passed(self) -> bool:
        """Whether every stage is within the bound and every id is equal or tied."""
        return not self.failed_stages and all(token.equal or token.tie for token in self.tokens)

    @property
    def failed_stages(self) -> tuple[StageResult, ...]:
        return tuple(stage for stage in self.stages if not stage.passed)

    @property
    def num_equal(self) -> int:
        return sum(token.equal for token in self.tokens)

    def failure(self) -> str | None:
        """Returns one line about the first failure, None if there is none."""
        if self.passed:
            return None
        if not self.failed_stages:
            return self._tokens_line()
        first = self.failed_stages[0]
        return (
            f"stage {first.title} is wrong, the stages before it are right ({first.finding(self.bound)}); "
            f"its tensors are {first.tensors}"
        )

    def table(self) -> str:
        """Returns a table: each stage with shape, errors and verdict, then the greedy ids and the cost of each side."""
        rows = [("stage", "shape", "relative error", "max difference", "")]
        for stage in self.stages:
            rows.append(
                (
                    stage.title,
                    " x ".join(map(str, stage.shape)),
                    f"{stage.relative_error:.1e}",
                    f"{stage.max_difference:.1e}",
                    "ok" if stage.passed else f"FAILED {stage.note}".rstrip(),
                )
            )
        lines = format_table(rows)
        if self.tokens:
            lines.append(self._tokens_line())
        lines += [side.describe() for side in (self.reference, self.mindspore)]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Returns the same as plain values for the JSON report."""
        return {
            "passed": self.passed,
            "bound": self.bound,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "greedy_ids": {
                "compared": len(self.tokens),
                "equal": self.num_equal,
                "different": [dataclasses.asdict(token) | {"step": step} for step, token in self._different()],
            },
            "reference": dataclasses.asdict(self.reference),
            "mindspore": dataclasses.asdict(self.mindspore),
        }

    def _different(self) -> list[tuple[int, Token]]:
        return [(step, token) for step, token in enumerate(self.tokens) if not token.equal]

    def _tokens_line(self) -> str:
        line = f"greedy ids: {self.num_equal} of {len(self.tokens)} equal"
        for step, token in self._different():
            verdict = "a tie" if token.tie else "FAILED"
            line += (
                f"; step {step}: {token.actual} instead of {token.expected}, whose logit is {token.gap:.1e} larger "
                f"({verdict}, the logits differ by up to {token.max_difference:.1e})"
            )
        return line


def compare_logits(request: ParityRequest) -> ParityReport:
    """Runs source and target on the same inputs and compares every stage; see the module.

    Memory: each process needs the float32 weights of the model and up to a third more; the caller needs a few MB.

    Raises:
        UserError: an unknown model, torch is not installed, a source or the target cannot be read, or a process failed
            or ran out of memory. A difference is no error: see `ParityReport.passed` and `failure`.
    """
    stages = stages_of(request.family, request.model)
    with tempfile.TemporaryDirectory(prefix="mindvlm-parity-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        for side in ("reference", "mindspore"):
            run_child(side, folder)
        return read_report(folder, stages, BOUND)


def read_report(folder: Path, stages: Mapping[str, Stage], bound: float) -> ParityReport:
    """Compares the outputs that the two processes wrote into `folder`.

    Raises:
        UserError: the sides have no stage.
    """
    with (
        open_checkpoint(folder / "reference.safetensors") as expected,
        open_checkpoint(folder / "mindspore.safetensors") as actual,
    ):
        results = tuple(
            compare_stage(key, stage, expected, actual, bound)
            for key, stage in stages.items()
            if key in expected.infos or key in actual.infos
        )
        if not results:
            raise UserError("--verify logits has nothing to compare: the tensors form no complete stage of the model")
        tokens = compare_tokens(expected, actual, bound)
        return ParityReport(results, tokens, bound, Side.of(expected), Side.of(actual))
