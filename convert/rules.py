"""Reversible rules that carry tensors from one naming and layout to another.

A rule is an immutable object over full name patterns, in which `{}` stands for a layer number: nothing matches in the
middle of a name, so `weight` never matches `weight_scale`. A rule says which source tensors it consumes, which target
tensors it produces and which elements of the sources each target is made of; `reverse()` is the rule of the way back.
An ordered table of rules makes a `Plan` (see plan.py), which checks that everything fits before a byte is read.

The idea of rules with a reverse follows the conversion mappings of transformers 5.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mindvlm.checkpoint import TensorInfo
from mindvlm.convert.plan import Piece, Plan, ShapeConflict, make_plan

_NUMBER = r"(0|[1-9][0-9]{0,5})"
Produced = list[tuple[TensorInfo, tuple[Piece, ...]]]


class Pattern:
    """A full tensor name with `{}` for layer numbers."""

    def __init__(self, text: str):
        self.text = text
        self.num_layers = text.count("{}")
        self._regex = re.compile(_NUMBER.join(re.escape(part) for part in text.split("{}")))

    def match(self, name: str) -> tuple[int, ...] | None:
        """Return the layer numbers in `name`, or None if it is not of this pattern."""
        found = self._regex.fullmatch(name)
        return tuple(int(number) for number in found.groups()) if found else None

    def fill(self, layers: Sequence[int]) -> str:
        """Return the name for the given layer numbers."""
        return self.text.format(*layers)


class Rule(ABC):
    """What all rules share: source and target patterns with the same number of `{}`."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The source patterns, in order."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """The target patterns, in order."""

    @abstractmethod
    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        """Return each target's info and the element ranges of the sources that it consists of.

        Args:
            sources: the source tensors, in the order of `sources`.
            names: the names of the targets, in the order of `targets`.

        Raises:
            ShapeConflict: the shapes or dtypes of the sources do not allow it; the message says why.
        """

    @abstractmethod
    def reverse(self) -> Rule | None:
        """Return the rule of the way back, or None if there is none (what was dropped stays dropped)."""

    @cached_property
    def source_patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(text) for text in self.sources)

    @cached_property
    def target_patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(text) for text in self.targets)


@dataclass(frozen=True)
class Rename(Rule):
    """One tensor under another name, its values untouched; source and target may be equal (an identity)."""

    source: str
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        info = sources[0]
        return [(TensorInfo(names[0], info.dtype, info.shape), (Piece(info.name, 0, info.num_elements),))]

    def reverse(self) -> Rule:
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Drop(Rule):
    """A tensor that is known and not needed; `reason` says why. It may be absent."""

    source: str
    reason: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return ()

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        return []

    def reverse(self) -> None:
        return None


@dataclass(frozen=True)
class Split(Rule):
    """One tensor cut along axis 0 into equal parts, one per part name."""

    source: str
    parts: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return self.parts

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        info = sources[0]
        if not info.shape or info.shape[0] % len(names):
            raise ShapeConflict(f"shape {list(info.shape)} does not split into {len(names)} equal parts")
        shape = (info.shape[0] // len(names), *info.shape[1:])
        size = info.num_elements // len(names)
        return [
            (TensorInfo(name, info.dtype, shape), (Piece(info.name, index * size, (index + 1) * size),))
            for index, name in enumerate(names)
        ]

    def reverse(self) -> Rule:
        return Concat(self.parts, self.source)


@dataclass(frozen=True)
class Concat(Rule):
    """Tensors of equal shape joined along axis 0: the reverse of `Split`."""

    parts: tuple[str, ...]
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return self.parts

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        first = sources[0]
        for info in sources:
            if info.shape != first.shape or not info.shape:
                raise ShapeConflict(f"shapes {list(first.shape)} and {list(info.shape)} do not join into one tensor")
            if info.dtype != first.dtype:
                raise ShapeConflict(f"dtypes {first.dtype} and {info.dtype} do not join into one tensor")
        shape = (first.shape[0] * len(sources), *first.shape[1:])
        pieces = tuple(Piece(info.name, 0, info.num_elements) for info in sources)
        return [(TensorInfo(names[0], first.dtype, shape), pieces)]

    def reverse(self) -> Rule:
        return Split(self.target, self.parts)


@dataclass(frozen=True)
class Part:
    """The rules of one part of a model; if any tensor of the part is there, all of them must be, in every layer."""

    name: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class RuleTable:
    """An ordered set of rules for one family and one naming.

    `name` says which naming is read, `family` names the model family.
    """

    name: str
    family: str
    parts: tuple[Part, ...]

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for part in self.parts for rule in part.rules)

    def claims(self, name: str) -> list[tuple[Rule, int, tuple[int, ...]]]:
        """Return the rules that consume `name`: the rule, which of its sources it is, and the layer numbers."""
        return [
            (rule, index, layers)
            for rule in self.rules
            for index, pattern in enumerate(rule.source_patterns)
            if (layers := pattern.match(name)) is not None
        ]

    def plan(
        self,
        source_infos: Mapping[str, TensorInfo],
        target_infos: Mapping[str, TensorInfo] | None = None,
        *,
        origin: str = "the checkpoint",
    ) -> Plan:
        """Decide where every tensor goes, from names and shapes alone.

        Args:
            source_infos: the tensors there are.
            target_infos: the tensors there must be afterwards (dtypes may differ between floating types). Without it
                every part of the table that is present at all must be complete.
            origin: what to call the source in messages.

        Raises:
            ConversionError: keys missing, unexpected, duplicated or misshapen; all of them, in one folded table.
        """
        return make_plan(self, source_infos, target_infos, origin)

    def reverse(self) -> RuleTable:
        """Return the table that leads back; dropped tensors do not come back."""
        parts = tuple(
            Part(part.name, tuple(back for rule in part.rules if (back := rule.reverse()) is not None))
            for part in self.parts
        )
        return RuleTable(f"{self.name} (reversed)", self.family, parts)

    def identity(self, name: str) -> RuleTable:
        """Return the table that recognises this table's targets and leaves them as they are."""
        parts = tuple(
            Part(part.name, tuple(Rename(target, target) for rule in part.rules for target in rule.targets))
            for part in self.parts
        )
        return RuleTable(name, self.family, parts)


def rename_all(source: str, target: str, endings: Iterable[str] = ("weight", "bias")) -> tuple[Rename, ...]:
    """Return a `Rename` for each ending, `source.ending` to `target.ending`."""
    return tuple(Rename(f"{source}.{ending}", f"{target}.{ending}") for ending in endings)
