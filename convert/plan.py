"""What a conversion will do, decided from names and shapes before anything is read, and the tensors it yields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.checkpoint.dtypes import is_float, storage_dtype
from mindvlm.convert.report import ConversionError, Finding, fold_name

if TYPE_CHECKING:
    from mindvlm.convert.rules import Pattern, Rule, RuleTable


class ShapeConflict(Exception):
    """A rule cannot be applied to tensors of these shapes or dtypes; the message says why."""


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
        dropped: source tensors that are left out, with the reason.
        uses: how often each rule was used.
    """

    table: RuleTable
    infos: Mapping[str, TensorInfo]
    pieces: Mapping[str, tuple[Piece, ...]]
    dropped: Mapping[str, str]
    uses: Mapping[Rule, int]

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: every tensor keeps its name and layout and none is dropped."""
        return not self.dropped and all(
            len(pieces) == 1 and pieces[0].source == name for name, pieces in self.pieces.items()
        )

    def view(self, source: TensorSource) -> PlannedSource:
        """Return the target tensors as a source that reads from `source` on demand."""
        return PlannedSource(self, source)


class PlannedSource(TensorSource):
    """The targets of a plan, read through it from its source."""

    def __init__(self, plan: Plan, source: TensorSource):
        self.path = source.path
        self.plan = plan
        self.infos = plan.infos
        self._source = source

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        runs = []
        offset = 0
        for piece in self.plan.pieces[name]:
            size = piece.stop - piece.start
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                runs.append(self._source.read_range(piece.source, piece.start + first, piece.start + last))
            offset += size
        if len(runs) == 1:
            return runs[0]
        return np.concatenate(runs) if runs else np.empty(0, storage_dtype(self.infos[name].dtype))

    def close(self) -> None:
        self._source.close()


@dataclass
class _Draft:
    """A plan in the making, with everything that was found to be wrong."""

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    uses: Counter[Rule] = field(default_factory=Counter)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def add(self, status: str, name: str, detail: str) -> None:
        self.findings.setdefault((status, name), Finding(status, name, detail))


def make_plan(
    table: RuleTable,
    source_infos: Mapping[str, TensorInfo],
    target_infos: Mapping[str, TensorInfo] | None,
    origin: str,
) -> Plan:
    """Make a plan; see `RuleTable.plan`."""
    draft = _Draft()
    for (rule, layers), sources in _group_by_rule(table, source_infos, draft).items():
        _apply(rule, layers, sources, draft)
    if target_infos is None:
        _require_whole_parts(table, source_infos, draft)
    else:
        _require_targets(table, source_infos, target_infos, draft)
    if draft.findings:
        raise ConversionError(f"{origin} does not fit the {table.family} model", list(draft.findings.values()))
    return Plan(table, draft.infos, draft.pieces, draft.dropped, draft.uses)


def _group_by_rule(
    table: RuleTable, source_infos: Mapping[str, TensorInfo], draft: _Draft
) -> dict[tuple[Rule, tuple[int, ...]], dict[int, TensorInfo]]:
    groups: dict[tuple[Rule, tuple[int, ...]], dict[int, TensorInfo]] = {}
    for name, info in source_infos.items():
        claims = table.claims(name)
        if not claims:
            draft.add("unexpected", name, f"no rule of the {table.name} names knows it")
        if len(claims) > 1:
            draft.add("duplicate", name, f"consumed by {len(claims)} rules")
        for rule, index, layers in claims[:1]:
            groups.setdefault((rule, layers), {})[index] = info
    return groups


def _apply(rule: Rule, layers: tuple[int, ...], sources: dict[int, TensorInfo], draft: _Draft) -> None:
    draft.uses[rule] += 1
    absent = [pattern for index, pattern in enumerate(rule.source_patterns) if index not in sources]
    for pattern in absent:
        draft.add("missing", pattern.fill(layers), "expected in the checkpoint")
    if absent:
        return
    ordered = [sources[index] for index in range(len(rule.sources))]
    if not rule.targets:
        draft.dropped[ordered[0].name] = getattr(rule, "reason", "")
        return
    try:
        produced = rule.produce(ordered, [pattern.fill(layers) for pattern in rule.target_patterns])
    except ShapeConflict as conflict:
        draft.add("shape", ordered[0].name, str(conflict))
        return
    for info, pieces in produced:
        if info.name in draft.infos:
            draft.add("duplicate", ordered[0].name, f"{info.name} comes from more than one tensor")
        draft.infos[info.name] = info
        draft.pieces[info.name] = pieces


def _require_whole_parts(table: RuleTable, source_infos: Mapping[str, TensorInfo], draft: _Draft) -> None:
    for part in table.parts:
        needed = [pattern for rule in part.rules if rule.targets for pattern in rule.source_patterns]
        found = [layers for pattern in needed for name in source_infos if (layers := pattern.match(name)) is not None]
        num_layers = max((layers[0] + 1 for layers in found if layers), default=0)
        if not found:
            continue
        if num_layers > len(source_infos):
            draft.add("missing", f"{part.name}: layers", f"the highest layer number is {num_layers - 1}")
            continue
        for pattern in needed:
            for name in _names_of(pattern, num_layers):
                if name not in source_infos:
                    draft.add("missing", name, f"the {part.name} is not complete without it")


def _names_of(pattern: Pattern, num_layers: int) -> Iterator[str]:
    if not pattern.num_layers:
        yield pattern.text
    for layer in range(num_layers if pattern.num_layers else 0):
        yield pattern.fill((layer,) * pattern.num_layers)


def _require_targets(
    table: RuleTable, source_infos: Mapping[str, TensorInfo], target_infos: Mapping[str, TensorInfo], draft: _Draft
) -> None:
    for name, wanted in target_infos.items():
        info = draft.infos.get(name)
        if info is None:
            for source in _sources_of(table, name) or [name]:
                if source not in source_infos:
                    draft.add("missing", source, f"needed for {fold_name(name)}")
        elif info.shape != wanted.shape:
            draft.add("shape", _first_source(draft, name), f"{list(info.shape)}, the model has {list(wanted.shape)}")
        elif is_float(info.dtype) != is_float(wanted.dtype):
            draft.add("dtype", _first_source(draft, name), f"{info.dtype}, the model has {wanted.dtype}")
    for name in draft.infos:
        if name not in target_infos:
            draft.add("unexpected", _first_source(draft, name), "the model has no such parameter")


def _sources_of(table: RuleTable, target: str) -> list[str]:
    """The source names whose rule produces `target`; those that are there were reported with another problem."""
    for rule in table.rules:
        for pattern in rule.target_patterns:
            layers = pattern.match(target)
            if layers is not None:
                return [source.fill(layers) for source in rule.source_patterns]
    return []


def _first_source(draft: _Draft, target: str) -> str:
    return draft.pieces[target][0].source
