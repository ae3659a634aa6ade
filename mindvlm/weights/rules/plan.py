"""What a conversion will do, decided from names and shapes before anything is read, and the tensors it yields."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.checkpoint.dtypes import storage_dtype
from mindvlm.core.errors import UserError

if TYPE_CHECKING:
    from mindvlm.weights.rules.operations import Rule
    from mindvlm.weights.rules.table import RuleTable


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened source tensor."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Where every tensor goes. Holds no values; `view` puts it over a source that has them.

    Attributes:
        table: the rules the plan was made with.
        infos: the target tensors, in the order of the source.
        pieces: for each target the source elements that it consists of, in order.
        ties: for each target that is stored under further names, those names; their values must be equal.
        dropped: source tensors that are left out, with the reason.
        uses: how often each rule was used.
        absent_parts: names of the table's parts of which nothing is there.
        aliases: the optional names of the table's `Tie` rules (patterns) that the source has.
    """

    table: RuleTable
    infos: Mapping[str, TensorInfo]
    pieces: Mapping[str, tuple[Piece, ...]]
    ties: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    uses: Mapping[Rule, int]
    absent_parts: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: every tensor keeps its name and layout and none is dropped."""
        return not self.dropped and not self.ties and len(self.identities) == len(self.infos)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """The tensors that keep their name and layout."""
        return tuple(name for name, pieces in self.pieces.items() if len(pieces) == 1 and pieces[0].source == name)

    @cached_property
    def fingerprint(self) -> str:
        """A text that is another one when a tensor of the result is, or consists of other elements of the source."""
        made = [(info, self.pieces[name]) for name, info in self.infos.items()]
        return hashlib.sha256(repr(made).encode()).hexdigest()

    @cached_property
    def unused_rules(self) -> tuple[Rule, ...]:
        """The rules of the table for which there was no tensor, those of absent parts and drops included."""
        return tuple(rule for rule in self.table.rules if rule not in self.uses)

    def sources_of(self, target: str) -> tuple[str, ...]:
        """Return the source tensors that `target` is made of or tied to, in order."""
        names = (*(piece.source for piece in self.pieces[target]), *self.ties.get(target, ()))
        return tuple(dict.fromkeys(names))

    def targets_of(self, source: str) -> tuple[str, ...]:
        """Return the targets that the source tensor goes to; none if it is dropped."""
        return self._targets.get(source, ())

    def reverse_table(self) -> RuleTable:
        """Return the table that leads the targets back to exactly the names of this source, but for dropped ones."""
        return self.table.without([name for name in self.table.aliases if name not in self.aliases]).reverse()

    def view(self, source: TensorSource) -> PlannedSource:
        """Return the target tensors as a source that reads from `source` on demand."""
        return PlannedSource(self, source)

    @cached_property
    def _targets(self) -> dict[str, tuple[str, ...]]:
        targets: dict[str, list[str]] = {}
        for target in self.infos:
            for source in self.sources_of(target):
                targets.setdefault(source, []).append(target)
        return {source: tuple(names) for source, names in targets.items()}


class PlannedSource(TensorSource):
    """The targets of a plan, read through it from its source.

    Raises:
        UserError: while reading, if two names of one tensor hold different values.
    """

    def __init__(self, plan: Plan, source: TensorSource):
        self.path = source.path
        self.plan = plan
        self.infos = plan.infos
        self._source = source

    @property
    def recipe(self) -> str:
        own = "" if self.plan.is_identity else self.plan.fingerprint
        return " ".join(filter(None, (own, self._source.recipe)))

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        runs = []
        offset = 0
        for piece in self.plan.pieces[name]:
            size = piece.stop - piece.start
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                runs.append(self._source.read_range(piece.source, piece.start + first, piece.start + last))
            offset += size
        for alias in self.plan.ties.get(name, ()):
            self._require_equal(name, alias, runs, start, stop)
        if len(runs) == 1:
            return runs[0]
        return np.concatenate(runs) if runs else np.empty(0, storage_dtype(self.infos[name].dtype))

    def close(self) -> None:
        self._source.close()

    def _require_equal(self, name: str, alias: str, runs: list[np.ndarray], start: int, stop: int) -> None:
        tied = self._source.read_range(alias, start, stop)
        if runs and not np.array_equal(_bits(runs[0]), _bits(tied)):
            first = self.plan.pieces[name][0].source
            raise UserError(
                f"{self.path}: {first} and {alias} are one tensor in this model ({name}) but hold different values; "
                f"remove the one that is not meant"
            )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
