"""Rule tables: reversible rules that carry tensors from one naming and layout to another.

The kinds of rules are in operations.py. `make_plan` in planning.py applies a table to the tensors of a checkpoint and
checks that everything fits before a byte is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

from mindvlm.weights.rules.findings import fold_name
from mindvlm.weights.rules.operations import Pattern, Rename, Rule, Tie

T = TypeVar("T")

CONNECTORS = "projectors"
"""The key of the parts that connect a tower to the decoder."""


class PatternIndex(Generic[T]):
    """Values by pattern, found through the name with its numbers folded, without trying all patterns."""

    def __init__(self, entries: Iterable[tuple[Pattern, T]]):
        self._folded: dict[str, list[tuple[Pattern, T]]] = {}
        self._others: list[tuple[Pattern, T]] = []
        for pattern, value in entries:
            if not pattern.is_open and pattern.text.split(".").count("{}") == pattern.num_layers:
                self._folded.setdefault(fold_name(pattern.text), []).append((pattern, value))
            else:
                self._others.append((pattern, value))

    def find(self, name: str) -> list[tuple[T, tuple[int, ...]]]:
        """Returns the value of each pattern that `name` matches, with the layer numbers in it."""
        return [
            (value, layers)
            for pattern, value in (*self._folded.get(fold_name(name), ()), *self._others)
            if (layers := pattern.match(name)) is not None
        ]


@dataclass(frozen=True)
class Part:
    """The rules of one part of a model; if any tensor of the part is there, all of them must be, in every layer.

    `key` is the word by which the command line selects the part; parts of one key are selected together. A model may
    have any of the parts of one `choice`; a part without a choice forms one under its own name.
    """

    name: str
    rules: tuple[Rule, ...]
    key: str = ""
    choice: str = ""

    def produces(self, target: str) -> bool:
        """Tells whether the target tensor belongs to this part."""
        return any(pattern.match(target) is not None for rule in self.rules for pattern in rule.target_patterns)


@dataclass(frozen=True)
class RuleTable:
    """An ordered set of rules for one family and one naming.

    `name` is the naming that the table reads, `family` the model family and `model` the model, if the table belongs to
    one. `takes_only` is the key of the part that the table takes out of another model's file; it drops the rest.
    """

    name: str
    family: str
    parts: tuple[Part, ...]
    model: str = ""
    takes_only: str = ""

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for part in self.parts for rule in part.rules)

    @property
    def aliases(self) -> tuple[str, ...]:
        """The optional names (patterns) of tied tensors."""
        return tuple(name for rule in self.rules for name in rule.optional)

    def absent(self, targets: Iterable[str]) -> tuple[str, ...]:
        """Returns the names of parts that are missing in a model of these targets, parts of a choice by its name."""
        produced = {part.choice or part.name for target in targets if (part := self.part_of(target))}
        return tuple(
            name for name in dict.fromkeys(part.choice or part.name for part in self.parts) if name not in produced
        )

    def claims(self, name: str) -> list[tuple[Rule, int, tuple[int, ...]]]:
        """Returns the rules that consume `name`: the rule, the index among its sources, and the layer numbers."""
        return [(rule, index, layers) for (rule, index), layers in self._sources.find(name)]

    def makers(self, target: str) -> list[tuple[Rule, tuple[int, ...]]]:
        """Returns the rules that produce `target`, with the layer numbers."""
        return [(rule, layers) for (rule, _), layers in self._targets.find(target)]

    def sources_of(self, target: str) -> tuple[str, ...]:
        """Returns the names that the rule for `target` needs; none if no rule produces it."""
        for rule, layers in self.makers(target)[:1]:
            return tuple(pattern.fill(layers) for pattern in rule.needed_patterns)
        return ()

    def part_of(self, target: str) -> Part | None:
        """Returns the part that the target tensor belongs to, None if no rule produces it."""
        found = self._targets.find(target)
        return found[0][0][1] if found else None

    def unit_of(self, target: str) -> tuple[str, str] | None:
        """Returns what must come from one source with the target tensor: the parts of one choice under one name."""
        part = self.part_of(target)
        return (part.choice or part.name, target.partition(".")[0]) if part else None

    def rest_of_units(self, targets: Collection[str], others: Iterable[str]) -> list[str]:
        """Returns those of the target tensors `others` that must come from one source with any of `targets`."""
        units = {self.unit_of(target) for target in targets}
        return [name for name in others if name not in targets and self.unit_of(name) in units]

    def reverse(self) -> RuleTable:
        """Returns the inverse table; dropped tensors do not come back."""
        parts = tuple(
            replace(part, rules=tuple(back for rule in part.rules if (back := rule.reverse()) is not None))
            for part in self.parts
        )
        return replace(self, name=f"{self.name} (reversed)", parts=parts)

    def without(self, aliases: Collection[str]) -> RuleTable:
        """Returns the table for files that lack the given optional names (those of `Tie` rules)."""
        parts = tuple(
            replace(part, rules=tuple(rule.without(aliases) if isinstance(rule, Tie) else rule for rule in part.rules))
            for part in self.parts
        )
        return replace(self, parts=parts)

    def identity(self, name: str) -> RuleTable:
        """Returns the table that recognizes this table's targets and keeps them as they are."""
        parts = tuple(
            replace(part, rules=tuple(Rename(target, target) for rule in part.rules for target in rule.targets))
            for part in self.parts
        )
        return replace(self, name=name, parts=parts)

    @cached_property
    def _sources(self) -> PatternIndex[tuple[Rule, int]]:
        return PatternIndex(
            (pattern, (rule, index)) for rule in self.rules for index, pattern in enumerate(rule.source_patterns)
        )

    @cached_property
    def _targets(self) -> PatternIndex[tuple[Rule, Part]]:
        return PatternIndex(
            (pattern, (rule, part)) for part in self.parts for rule in part.rules for pattern in rule.target_patterns
        )


def rename_all(source: str, target: str, endings: Iterable[str] = ("weight", "bias")) -> tuple[Rename, ...]:
    """Returns a `Rename` for each ending, `source.ending` to `target.ending`."""
    return tuple(Rename(f"{source}.{ending}", f"{target}.{ending}") for ending in endings)
