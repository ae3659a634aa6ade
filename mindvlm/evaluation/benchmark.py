"""The interface of a benchmark: questions, how a model answers them, and how answers are scored."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mindvlm.core.errors import counted

Answer = dict[str, Any]
"""A line of an answers file, without `model_id` and `metadata`."""
Tables = dict[str, dict[str, dict[str, float]]]
"""Task -> row -> metric -> value."""
Intervals = dict[str, dict[str, dict[str, tuple[float, float]]]]
"""Task -> row -> metric -> limits of the confidence interval."""

OWN_KEYS = ("question_id", "model_id", "metadata")
# questions that are answered together, as many as the session has slots
BATCH_SIZE = 16


@dataclass
class Answered:
    """Answers, and the errors of questions that cannot be answered, both by question id."""

    answers: dict[str, Answer] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class Scores:
    """The result of a benchmark.

    Attributes:
        tables: the figures.
        intervals: confidence intervals of figures.
        files: files that were written, such as a submission.
        notes: what the figures leave out, one line each.
        remarks: figures that are not computed here, and how to get them, one line each.
    """

    tables: Tables
    intervals: Intervals = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class Questions(Protocol):
    """The questions of a benchmark over one folder of data.

    Attributes:
        ids: of all questions, in order.
        settings: values that answers depend on, for JSON; answers made with others are refused.
        answered_twice: whether the original program writes every answer twice.
    """

    ids: Sequence[str]
    settings: dict[str, Any]
    answered_twice: bool

    def answers(self, model: Any, ids: Sequence[str], folder: Path) -> Iterator[Answered]:
        """Answers questions and yields the answers as they come. Files that answers name are written below `folder`."""

    def parse(self, row: dict[str, Any]) -> tuple[str, Answer]:
        """Returns the id and the answer of a line. Raises KeyError, TypeError or AttributeError if it has none."""

    def score(self, answers: Mapping[str, Answer], folder: Path, output: Path) -> Scores:
        """Computes the figures. Files that answers name are read from `folder`, results are written to `output`.

        Raises:
            UserError: an answer lacks a value or its file.
        """


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        summary: what it measures, in one line.
        needs: what the folder `--data` has to hold, in one line.
        output: what a model must generate, as in `Family.output`.
        open: returns the questions; called with (folder of the data, parsed options). Raises UserError if the data or
            an option cannot be used. Must not import MindSpore.
        add_options: adds its options to those of all benchmarks.
        headline: row and metric of the figure that papers report; empty without one.
    """

    summary: str
    needs: str
    output: Literal["text", "pictures"]
    open: Callable[[Path, argparse.Namespace], Questions]
    add_options: Callable[[argparse.ArgumentParser], None]
    headline: tuple[str, str] = ("", "")


class BatchedQuestions:
    """Base of questions that are answered in batches, with answers of their own keys."""

    answered_twice = False

    def answers(self, model: Any, ids: Sequence[str], folder: Path) -> Iterator[Answered]:
        """See `Questions.answers`."""
        for start in range(0, len(ids), BATCH_SIZE):
            yield self.answer(model, ids[start : start + BATCH_SIZE], folder)

    def answer(self, model: Any, ids: Sequence[str], folder: Path) -> Answered:
        """Answers a batch. Files that answers name are written below `folder`."""
        raise NotImplementedError

    def parse(self, row: dict[str, Any]) -> tuple[str, Answer]:
        """See `Questions.parse`."""
        return row["question_id"], {key: value for key, value in row.items() if key not in OWN_KEYS}


def missing_note(
    answers: Mapping[str, Answer], ids: Sequence[str], singular: str = "is not scored", plural: str = "are not scored"
) -> str:
    """Returns a line about questions without an answer and what becomes of them; empty if there are none."""
    missing = [question_id for question_id in ids if question_id not in answers]
    if not missing:
        return ""
    fate = f"has no answer and {singular}" if len(missing) == 1 else f"have no answer and {plural}"
    return f"{counted(len(missing), 'question')} of {len(ids)} {fate}, first {missing[0]!r}"
