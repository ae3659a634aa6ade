"""The plan of a conversion, made from names and shapes before anything is read, and a view of the resulting tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mindvlm.checkpoint import SourceView, TensorInfo, TensorSource
from mindvlm.checkpoint.dtypes import storage_dtype
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.operations import Rule, Slice
from mindvlm.weights.rules.table import RuleTable


@dataclass(frozen=True)
class Plan:
    """The destination of every tensor. Holds no values; `view` applies the plan to a source that has them.

    Attributes:
        table: the rules the plan was made with.
        infos: the target tensors, in the order of the source.
        slices: for each target the source elements that it consists of, in order.
        ties: for each target that is stored under further names, those names; their values must be equal.
        dropped: source tensors that are left out, with the reasons.
        uses: how often each rule was used.
        absent_parts: names of the table's parts that are missing.
        aliases: the optional names of the table's `Tie` rules (patterns) that the source has.
    """

    table: RuleTable
    infos: Mapping[str, TensorInfo]
    slices: Mapping[str, tuple[Slice, ...]]
    ties: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    uses: Mapping[Rule, int]
    absent_parts: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def is_identity(self) -> bool:
        """Whether every tensor keeps its name and layout and none is dropped."""
        return not self.dropped and not self.ties and len(self.identities) == len(self.infos)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """The tensors that keep their name and layout."""
        return tuple(name for name, slices in self.slices.items() if len(slices) == 1 and slices[0].source == name)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the resulting tensors and of the source elements that they consist of."""
        made = [(info, self.slices[name]) for name, info in self.infos.items()]
        return hashlib.sha256(repr(made).encode()).hexdigest()

    @cached_property
    def unused_rules(self) -> tuple[Rule, ...]:
        """The rules of the table that matched no tensor, including those of absent parts and drops."""
        return tuple(rule for rule in self.table.rules if rule not in self.uses)

    def sources_of(self, target: str) -> tuple[str, ...]:
        """Returns the source tensors that `target` consists of or is tied to, in order."""
        names = (*(part.source for part in self.slices[target]), *self.ties.get(target, ()))
        return tuple(dict.fromkeys(names))

    def targets_of(self, source: str) -> tuple[str, ...]:
        """Returns the targets that the source tensor goes to; none if it is dropped."""
        return self._targets.get(source, ())

    def reverse_table(self) -> RuleTable:
        """Returns the table that maps the targets back to exactly the names of this source, except dropped ones."""
        return self.table.without([name for name in self.table.aliases if name not in self.aliases]).reverse()

    def view(self, source: TensorSource) -> PlannedSource:
        """Returns the target tensors as a source that reads from `source` on demand."""
        return PlannedSource(self, source)

    @cached_property
    def _targets(self) -> dict[str, tuple[str, ...]]:
        targets: dict[str, list[str]] = {}
        for target in self.infos:
            for source in self.sources_of(target):
                targets.setdefault(source, []).append(target)
        return {source: tuple(names) for source, names in targets.items()}


class PlannedSource(SourceView):
    """The targets of a plan, read on demand from its source.

    Raises:
        UserError: while reading, if two names of one tensor hold different values.
    """

    def __init__(self, plan: Plan, source: TensorSource):
        super().__init__(source, plan.infos)
        self.plan = plan

    @property
    def recipe(self) -> str:
        own = "" if self.plan.is_identity else self.plan.fingerprint
        return " ".join(filter(None, (own, self._source.recipe)))

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        runs = []
        offset = 0
        for part in self.plan.slices[name]:
            size = part.stop - part.start
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                runs.append(self._source.read_range(part.source, part.start + first, part.start + last))
            offset += size
        for alias in self.plan.ties.get(name, ()):
            self._require_equal(name, alias, runs, start, stop)
        if len(runs) == 1:
            return runs[0]
        return np.concatenate(runs) if runs else np.empty(0, storage_dtype(self.infos[name].dtype))

    def _require_equal(self, name: str, alias: str, runs: list[np.ndarray], start: int, stop: int) -> None:
        tied = self._source.read_range(alias, start, stop)
        if runs and not np.array_equal(_bits(runs[0]), _bits(tied)):
            first = self.plan.slices[name][0].source
            raise UserError(
                f"{self.path}: {first} and {alias} are one tensor in this model ({name}) but hold different values; "
                "remove the wrong one"
            )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
