"""The kinds of rules: the tensors that each consumes and produces, and its reverse.

A rule is an immutable object over full name patterns, in which `{}` stands for a layer number: nothing matches in the
middle of a name, so `weight` never matches `weight_scale`. A rule states which source tensors it consumes, which target
tensors it produces, and which elements of the sources each target consists of; `reverse()` returns the inverse rule.

Reversible rules follow the idea of the conversion mappings of transformers 5.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from mindvlm.checkpoint import TensorInfo
from mindvlm.weights.rules.findings import Finding

Layers = Sequence[int | str]

_NUMBER = r"(0|[1-9][0-9]{0,5})"
_REST = ".*"


class Pattern:
    """A full tensor name with `{}` for layer numbers; one that ends with `.*` stands for all names below it.

    What an open pattern matches behind its dot counts as its last layer number.
    """

    def __init__(self, text: str):
        self.text = text
        self.num_layers = text.count("{}")
        self.is_open = text.endswith(_REST)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        fixed = self.text.removesuffix("*") if self.is_open else self.text
        regex = _NUMBER.join(re.escape(part) for part in fixed.split("{}"))
        return re.compile(regex + ("(.+)" if self.is_open else ""))

    def match(self, name: str) -> Layers | None:
        """Returns the layer numbers in `name`, None if it does not match."""
        found = self._regex.fullmatch(name)
        if not found:
            return None
        numbers, rest = found.groups()[: self.num_layers], found.groups()[self.num_layers :]
        return (*map(int, numbers), *rest)

    def fill(self, layers: Layers) -> str:
        """Returns the name for the given layer numbers."""
        if self.is_open:
            return self.text.removesuffix("*").format(*layers[:-1]) + layers[-1]
        return self.text.format(*layers)


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flattened source tensor."""

    source: str
    start: int
    stop: int


Produced = list[tuple[TensorInfo, tuple[Slice, ...]]]


class ShapeConflict(Exception):
    """A rule cannot be applied to tensors of these shapes or dtypes; `findings` names them with the reasons."""

    def __init__(self, findings: Sequence[Finding]):
        self.findings = tuple(findings)
        super().__init__("; ".join(f"{finding.name}: {finding.detail}" for finding in findings))


class Rule(ABC):
    """The base of all rules: one source pattern or several, and as many targets, all with the same number of `{}`."""

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The source patterns, in order."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The target patterns, in order."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def optional(self) -> tuple[str, ...]:
        """Those of `sources`, at their end, that may be absent."""
        return ()

    @abstractmethod
    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        """Returns each target's info and the slices of the sources that it consists of.

        Args:
            sources: the source tensors that are present, in the order of `sources`.
            names: the names of the targets, in the order of `targets`.

        Raises:
            ShapeConflict: the shapes or dtypes of the sources do not allow it.
        """

    @abstractmethod
    def reverse(self) -> Rule | None:
        """Returns the inverse rule, None if there is none (a dropped tensor stays dropped)."""

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
    """Renames a tensor and keeps its values; source and target may be equal (an identity).

    `source.*` to `target.*` renames all tensors below a prefix. It does not know which of them a model has.
    """

    source: str
    target: str

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        return [_whole(sources[0], names[0])]

    def reverse(self) -> Rule:
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Drop(Rule):
    """Drops a tensor that is not needed, for the given reason; it may be absent. `prefix.*` drops all below it."""

    source: str
    reason: str
    target: ClassVar[tuple[str, ...]] = ()

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        return []

    def reverse(self) -> None:
        return None


@dataclass(frozen=True)
class Split(Rule):
    """Splits a tensor along axis 0 into equal parts, one per target."""

    source: str
    target: tuple[str, ...]

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        info = sources[0]
        if not info.shape or info.shape[0] % len(names):
            detail = f"{list(info.shape)} does not split into {len(names)} equal parts"
            raise ShapeConflict([Finding("shape", info.name, detail)])
        shape = (info.shape[0] // len(names), *info.shape[1:])
        size = info.num_elements // len(names)
        return [
            (TensorInfo(name, info.dtype, shape), (Slice(info.name, index * size, (index + 1) * size),))
            for index, name in enumerate(names)
        ]

    def reverse(self) -> Rule:
        return Concat(self.target, self.source)


@dataclass(frozen=True)
class Concat(Rule):
    """Joins tensors of equal shape along axis 0: the reverse of `Split`."""

    source: tuple[str, ...]
    target: str

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        _require_equal(sources, "joined with")
        first = sources[0]
        if not first.shape:
            raise ShapeConflict([Finding("shape", first.name, "[] has no axis to join along")])
        shape = (first.shape[0] * len(sources), *first.shape[1:])
        slices = tuple(Slice(info.name, 0, info.num_elements) for info in sources)
        return [(TensorInfo(names[0], first.dtype, shape), slices)]

    def reverse(self) -> Rule:
        return Split(self.target, self.source)


@dataclass(frozen=True)
class Tie(Rule):
    """Reads one tensor that is stored under several names: the first always, the others perhaps.

    Shapes and dtypes must be equal; equality of the values is checked when they are read.
    """

    source: tuple[str, ...]
    target: str

    @property
    def optional(self) -> tuple[str, ...]:
        return self.source[1:]

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        _require_equal(sources, "tied to")
        return [_whole(sources[0], names[0])]

    def without(self, aliases: Collection[str]) -> Rule:
        """Returns the rule for files that lack the given optional names."""
        first, *others = self.source
        names = (first, *(name for name in others if name not in aliases))
        return Tie(names, self.target) if len(names) > 1 else Rename(first, self.target)

    def reverse(self) -> Rule:
        return Untie(self.target, self.source)


@dataclass(frozen=True)
class Untie(Rule):
    """Writes one tensor under several names: the reverse of `Tie`."""

    source: str
    target: tuple[str, ...]

    def produce(self, sources: Sequence[TensorInfo], names: Sequence[str]) -> Produced:
        return [_whole(sources[0], name) for name in names]

    def reverse(self) -> Rule:
        return Tie(self.target, self.source)


def _whole(info: TensorInfo, name: str) -> tuple[TensorInfo, tuple[Slice, ...]]:
    """Returns `info` under another name, with all its elements."""
    return TensorInfo(name, info.dtype, info.shape), (Slice(info.name, 0, info.num_elements),)


def _require_equal(infos: Sequence[TensorInfo], relation: str) -> None:
    """Raises a `ShapeConflict` that names the tensors whose shape or dtype differs from the majority."""
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
