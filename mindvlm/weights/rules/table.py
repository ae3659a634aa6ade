"""Rule tables: reversible rules that carry tensors from one naming and layout to another.

An ordered table of rules (their kinds are in operations.py) makes a `Plan` (see plan.py), which checks that
everything fits before a byte is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mindvlm.checkpoint import TensorInfo
from mindvlm.weights.rules.operations import Rename, Rule, Tie
from mindvlm.weights.rules.patterns import PatternIndex
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.planning import make_plan


@dataclass(frozen=True)
class Part:
    """The rules of one part of a model; if any tensor of the part is there, all of them must be, in every layer.

    `key` is the word by which the command line selects the part; parts of one key are selected together. Of the parts
    of one `choice`, a model need not have all; a part without one makes up a choice under its own name.
    """

    name: str
    rules: tuple[Rule, ...]
    key: str = ""
    choice: str = ""

    def produces(self, target: str) -> bool:
        """Tell whether the target tensor belongs to this part."""
        return any(pattern.match(target) is not None for rule in self.rules for pattern in rule.target_patterns)


@dataclass(frozen=True)
class RuleTable:
    """An ordered set of rules for one family and one naming.

    `name` says which naming is read, `family` names the model family and `model` the model, where the table belongs to
    one. A table that `hands_over` takes only the vision vocabulary of another model's file and drops the rest.
    """

    name: str
    family: str
    parts: tuple[Part, ...]
    model: str = ""
    hands_over: bool = False

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for part in self.parts for rule in part.rules)

    @property
    def aliases(self) -> tuple[str, ...]:
        """The optional names (patterns) of tied tensors."""
        return tuple(name for rule in self.rules for name in rule.optional)

    def absent(self, targets: Iterable[str]) -> tuple[str, ...]:
        """Return the names of parts that are missing in a model of these targets, parts of a choice by its name."""
        produced = {part.choice or part.name for target in targets if (part := self.part_of(target))}
        return tuple(
            name for name in dict.fromkeys(part.choice or part.name for part in self.parts) if name not in produced
        )

    def claims(self, name: str) -> list[tuple[Rule, int, tuple[int, ...]]]:
        """Return the rules that consume `name`: the rule, which of its sources it is, and the layer numbers."""
        return [(rule, index, layers) for (rule, index), layers in self._sources.find(name)]

    def makers(self, target: str) -> list[tuple[Rule, tuple[int, ...]]]:
        """Return the rules that produce `target`, with the layer numbers."""
        return [(rule, layers) for (rule, _), layers in self._targets.find(target)]

    def sources_of(self, target: str) -> tuple[str, ...]:
        """Return the names that the rule for `target` needs; none if no rule produces it."""
        for rule, layers in self.makers(target)[:1]:
            return tuple(pattern.fill(layers) for pattern in rule.needed_patterns)
        return ()

    def part_of(self, target: str) -> Part | None:
        """Return the part that the target tensor belongs to, or None if no rule produces it."""
        found = self._targets.find(target)
        return found[0][0][1] if found else None

    def plan(
        self,
        source_infos: Mapping[str, TensorInfo],
        target_infos: Mapping[str, TensorInfo] | None = None,
        *,
        origin: str = "the checkpoint",
        partial: bool = False,
        left_out: Mapping[str, str] | None = None,
    ) -> Plan:
        """Decide where every tensor goes, from names and shapes alone.

        Args:
            source_infos: the tensors there are.
            target_infos: the tensors there must be afterwards (dtypes may differ between floating types). Without it
                every part of the table that is present at all must be complete.
            origin: what to call the source in messages.
            partial: parts of which nothing is there are no error, even if `target_infos` has them.
            left_out: how the names of targets begin that are dropped if they are there, each with the reason.

        Raises:
            ConversionError: keys missing, unexpected, duplicated or misshapen; all of them, in one folded table.
        """
        return make_plan(self, source_infos, target_infos, origin=origin, partial=partial, left_out=left_out or {})

    def reverse(self) -> RuleTable:
        """Return the table that leads back; dropped tensors do not come back."""
        parts = tuple(
            replace(part, rules=tuple(back for rule in part.rules if (back := rule.reverse()) is not None))
            for part in self.parts
        )
        return replace(self, name=f"{self.name} (reversed)", parts=parts)

    def without(self, aliases: Collection[str]) -> RuleTable:
        """Return the table for files that lack the given optional names (those of `Tie` rules)."""
        parts = tuple(
            replace(part, rules=tuple(rule.without(aliases) if isinstance(rule, Tie) else rule for rule in part.rules))
            for part in self.parts
        )
        return replace(self, parts=parts)

    def identity(self, name: str) -> RuleTable:
        """Return the table that recognises this table's targets and leaves them as they are."""
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
    """Return a `Rename` for each ending, `source.ending` to `target.ending`."""
    return tuple(Rename(f"{source}.{ending}", f"{target}.{ending}") for ending in endings)
