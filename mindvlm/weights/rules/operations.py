"""The kinds of rules: what each consumes, what it produces, and its way back.

A rule is an immutable object over full name patterns, in which `{}` stands for a layer number: nothing matches in the
middle of a name, so `weight` never matches `weight_scale`. A rule says which source tensors it consumes, which target
tensors it produces and which elements of the sources each target is made of; `reverse()` is the rule of the way back.

The idea of rules with a reverse follows the conversion mappings of transformers 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from mindvlm.checkpoint import TensorInfo
from mindvlm.weights.rules.findings import Finding
from mindvlm.weights.rules.patterns import Pattern
from mindvlm.weights.rules.plan import Piece

Produced = list[tuple[TensorInfo, tuple[Piece, ...]]]


class ShapeConflict(Exception):
    """A rule cannot be applied to tensors of these shapes or dtypes; `findings` names them and says why."""

    def __init__(self, findings: Sequence[Finding]):
        self.findings = tuple(findings)
        super().__init__("; ".join(f"{finding.name}: {finding.detail}" for finding in findings))


class Rule(ABC):
    """What all rules share: source and target patterns with the same number of `{}`."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The source patterns, in order."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Those of `sources`, at their end, that may be absent."""
        return ()

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """The target patterns, in order."""

    @abstractmethod
    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        """Return each target's info and the element ranges of the sources that it consists of.

        Args:
            sources: the source tensors that are there, in the order of `sources`.
            names: the names of the targets, in the order of `targets`.

        Raises:
            ShapeConflict: the shapes or dtypes of the sources do not allow it.
        """

    @abstractmethod
    def reverse(self) -> Rule | None:
        """Return the rule of the way back, or None if there is none (what was dropped stays dropped)."""

    @cached_property
    def source_patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern(text) for text in self.sources)

    @cached_property
    def needed_patterns(self) -> tuple[Pattern, ...]:
        """The source patterns that must be there for the rule to be applied."""
        return self.source_patterns[: len(self.sources) - len(self.optional)]

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
        return [_whole(sources[0], names[0])]

    def reverse(self) -> Rule:
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Drop(Rule):
    """A tensor that is known and not needed; `reason` says why. It may be absent. `prefix.*` drops all below it."""

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
            detail = f"{list(info.shape)} does not split into {len(names)} equal parts"
            raise ShapeConflict([Finding("shape", info.name, detail)])
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
        _require_equal(sources, "joined with")
        first = sources[0]
        if not first.shape:
            raise ShapeConflict([Finding("shape", first.name, "[] has no axis to join along")])
        shape = (first.shape[0] * len(sources), *first.shape[1:])
        pieces = tuple(Piece(info.name, 0, info.num_elements) for info in sources)
        return [(TensorInfo(names[0], first.dtype, shape), pieces)]

    def reverse(self) -> Rule:
        return Split(self.target, self.parts)


@dataclass(frozen=True)
class Tie(Rule):
    """One tensor that is stored under several names: `names[0]` always, the others perhaps.

    Shapes and dtypes must be equal; that the values are is checked when they are read.
    """

    names: tuple[str, ...]
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return self.names

    @property
    def optional(self) -> tuple[str, ...]:
        return self.names[1:]

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        _require_equal(sources, "tied to")
        return [_whole(sources[0], names[0])]

    def without(self, aliases: Collection[str]) -> Rule:
        """Return the rule for files that lack the given optional names."""
        names = (self.names[0], *(name for name in self.names[1:] if name not in aliases))
        return Tie(names, self.target) if len(names) > 1 else Rename(names[0], self.target)

    def reverse(self) -> Rule:
        return Untie(self.target, self.names)


@dataclass(frozen=True)
class Untie(Rule):
    """One tensor written under several names: the reverse of `Tie`."""

    source: str
    names: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return self.names

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        return [_whole(sources[0], name) for name in names]

    def reverse(self) -> Rule:
        return Tie(self.names, self.source)


def _whole(info: TensorInfo, name: str) -> tuple[TensorInfo, tuple[Piece, ...]]:
    """Return `info` under another name, made of all its elements."""
    return TensorInfo(name, info.dtype, info.shape), (Piece(info.name, 0, info.num_elements),)


def _require_equal(infos: Sequence[TensorInfo], relation: str) -> None:
    """Raise a `ShapeConflict` that names the tensors whose shape or dtype is not that of most of them."""
    findings = _odd_ones(infos, "shape", lambda info: str(list(info.shape)), relation)
    findings += _odd_ones(infos, "dtype", lambda info: info.dtype, relation)
    if findings:
        raise ShapeConflict(findings)


def _odd_ones(
    infos: Sequence[TensorInfo], status: str, value_of: Callable[[TensorInfo], str], relation: str
) -> list[Finding]:
    values = [value_of(info) for info in infos]
    counts = Counter(values)
    if len(counts) == 1:
        return []
    most = counts.most_common(1)[0][1]
    usual = [value for value, count in counts.items() if count == most]
    return [
        Finding(status, info.name, f"{value}, {relation} {' and '.join(other for other in counts if other != value)}")
        for info, value in zip(infos, values, strict=True)
        if len(usual) > 1 or value != usual[0]
    ]
