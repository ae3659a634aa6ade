"""Patterns of tensor names, and an index that finds the patterns of a name without trying them all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from mindvlm.weights.rules.findings import fold_name

_NUMBER = r"(0|[1-9][0-9]{0,5})"
_REST = ".*"
T = TypeVar("T")


class Pattern:
    """A full tensor name with `{}` for layer numbers; one that ends with `.*` stands for all names below it."""

    def __init__(self, text: str):
        self.text = text
        self.num_layers = text.count("{}")
        self.is_open = text.endswith(_REST)
        fixed = text.removesuffix("*") if self.is_open else text
        regex = _NUMBER.join(re.escape(part) for part in fixed.split("{}"))
        self._regex = re.compile(regex + (".+" if self.is_open else ""))

    def match(self, name: str) -> tuple[int, ...] | None:
        """Return the layer numbers in `name`, or None if it is not of this pattern."""
        found = self._regex.fullmatch(name)
        return tuple(int(number) for number in found.groups()) if found else None

    def fill(self, layers: Sequence[int]) -> str:
        """Return the name for the given layer numbers."""
        return self.text.format(*layers)


class PatternIndex(Generic[T]):
    """Patterns with what belongs to each, found by the name with its numbers folded."""

    def __init__(self, entries: Iterable[tuple[Pattern, T]]):
        self._folded: dict[str, list[tuple[Pattern, T]]] = {}
        self._others: list[tuple[Pattern, T]] = []
        for pattern, value in entries:
            if not pattern.is_open and pattern.text.split(".").count("{}") == pattern.num_layers:
                self._folded.setdefault(fold_name(pattern.text), []).append((pattern, value))
            else:
                self._others.append((pattern, value))

    def find(self, name: str) -> list[tuple[T, tuple[int, ...]]]:
        """Return what belongs to each pattern of `name`, with the layer numbers in it."""
        return [
            (value, layers)
            for pattern, value in (*self._folded.get(fold_name(name), ()), *self._others)
            if (layers := pattern.match(name)) is not None
        ]
