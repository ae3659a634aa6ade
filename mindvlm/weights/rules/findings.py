"""Findings about a checkpoint that does not fit the model, folded into one readable table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mindvlm.checkpoint import TensorInfo
from mindvlm.checkpoint.dtypes import is_float
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import find_block

_MEANING = {
    "missing": "not in the checkpoint",
    "unexpected": "in the checkpoint, but unknown",
    "shape": "another shape than the model",
    "dtype": "another kind of dtype than the model",
    "duplicate": "claimed or produced more than once",
}


@dataclass(frozen=True)
class Finding:
    """A problem of one tensor; `status` is a key of the table's legend."""

    status: str
    name: str
    detail: str


@dataclass(frozen=True)
class Row:
    """Findings of the same kind whose names differ in numbers only."""

    status: str
    pattern: str
    names: tuple[str, ...]
    detail: str

    @property
    def label(self) -> str:
        """The name if there is only one, else the pattern with the numbers that it stands for."""
        if len(self.names) == 1:
            return self.names[0]
        return f"{self.pattern} ({_ranges(_varying_numbers(self.names))})"


class ConversionError(UserError):
    """A checkpoint does not fit the model. The message is one line; `table()` shows everything, folded.

    Attributes:
        what: the checkpoint and the model.
        findings: the problems.
        remedy: the remedy if the cause is known, else empty.
    """

    def __init__(self, what: str, findings: Sequence[Finding], remedy: str = ""):
        self.what, self.findings, self.remedy = what, tuple(findings), remedy
        self.rows = fold(findings)
        counts = {status: sum(f.status == status for f in findings) for status in _MEANING}
        summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        first = self.rows[0]
        message = f"{what}: {summary}; first: {first.status} {first.label} ({first.detail})"
        super().__init__(f"{message}; {remedy}" if remedy else message)

    def table(self) -> str:
        """Returns one line per kind of finding and name pattern, with a legend."""
        cells = [("status", "tensors", "name", "detail")]
        cells += [(row.status, str(len(row.names)), row.label, row.detail) for row in self.rows]
        used = dict.fromkeys(row.status for row in self.rows)
        return "\n".join([*format_table(cells), "", *(f"{status}: {_MEANING[status]}" for status in used)])


def find_conflict(name: str, info: TensorInfo, wanted: TensorInfo, owner: str) -> Finding | None:
    """Compares shape and kind of dtype of two tensors; returns the conflict, None if they agree.

    Args:
        name: the tensor that the finding is about.
        info: the tensor as it is, or as it will be.
        wanted: the expected tensor; another dtype of the same kind is no conflict.
        owner: where `wanted` comes from, for the message.
    """
    if info.shape != wanted.shape:
        return Finding("shape", name, f"{list(info.shape)}, {owner} has {list(wanted.shape)}")
    if _kind(info.dtype) != _kind(wanted.dtype):
        return Finding("dtype", name, f"{info.dtype}, expected {_kind(wanted.dtype)}")
    return None


def fold(findings: Sequence[Finding]) -> list[Row]:
    """Groups findings of equal status and detail whose names differ only in layer numbers, in order of appearance."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    order = list(_MEANING)
    for finding in sorted(findings, key=lambda finding: order.index(finding.status)):
        groups.setdefault((finding.status, fold_name(finding.name), finding.detail), []).append(finding.name)
    return [Row(status, pattern, tuple(names), detail) for (status, pattern, detail), names in groups.items()]


def fold_name(name: str) -> str:
    """Replaces the numbers between dots by `{}`."""
    return ".".join("{}" if _is_number(part) else part for part in name.split("."))


def fold_label(names: Sequence[str]) -> str:
    """Describes several names by at most three of their patterns and their number; a single name stays as it is."""
    if len(names) == 1:
        return names[0]
    patterns = list(dict.fromkeys(fold_name(name) for name in names))
    more = f" and {len(patterns) - 3} more names" if len(patterns) > 3 else ""
    return f"{', '.join(patterns[:3])}{more} ({len(names)} tensors)"


def format_table(rows: Sequence[Sequence[str]], *, numbers: Collection[int] = ()) -> list[str]:
    """Aligns the columns of `rows`, those in `numbers` to the right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [cell.rjust(width) if k in numbers else cell.ljust(width) for k, (cell, width) in enumerate(cells)]
        lines.append("  ".join(aligned).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _kind(dtype: str) -> str:
    if is_float(dtype) or find_block(dtype):
        return "floating point"
    return "bool" if dtype == "bool" else "integer"


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 7


def _varying_numbers(names: Sequence[str]) -> list[int]:
    split = [name.split(".") for name in names]
    for column in zip(*split, strict=True):
        if len(set(column)) > 1:
            return sorted({int(part) for part in column})
    return []


def _ranges(numbers: Sequence[int]) -> str:
    """Writes sorted numbers as ranges: [0, 1, 2, 5] becomes "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
