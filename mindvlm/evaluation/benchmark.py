"""The interface of a benchmark: questions, how a model answers them, and how answers are scored."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Answer = dict[str, Any]
"""A line of an answers file, without `question_id`, `model_id` and `metadata`."""
Tables = dict[str, dict[str, dict[str, float]]]
"""Task -> row -> metric -> value."""


@dataclass
class Answered:
    """The answers of a batch, and the errors of questions that cannot be answered, both by question id."""

    answers: dict[str, Answer] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


class Questions(Protocol):
    """The questions of a benchmark over one folder of data.

    Attributes:
        ids: of all questions, in order.
        settings: values that answers depend on, for JSON; answers made with others are refused.
    """

    ids: Sequence[str]
    settings: dict[str, Any]

    def answer(self, model: Any, ids: Sequence[str], folder: Path) -> Answered:
        """Answers a batch. Files that answers name are written below `folder`."""

    def score(self, answers: Mapping[str, Answer], folder: Path) -> Tables:
        """Computes the figures. Files that answers name are read from `folder`.

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
    """

    summary: str
    needs: str
    output: Literal["text", "pictures"]
    open: Callable[[Path, argparse.Namespace], Questions]
    add_options: Callable[[argparse.ArgumentParser], None]
