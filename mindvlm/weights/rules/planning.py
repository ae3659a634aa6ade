"""Makes a plan: assigns every source tensor to its rule, applies every rule, and collects all problems at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from mindvlm.checkpoint import TensorInfo
from mindvlm.weights.rules.findings import ConversionError, Finding, find_conflict, fold_name
from mindvlm.weights.rules.operations import Drop, Pattern, Rule, ShapeConflict, Slice
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.table import Part, RuleTable

_MAX_TENSORS_PER_PATTERN = 100_000
_NO_PARAMETER = "the model has no such parameter"
Groups = dict[tuple[Rule, tuple[int, ...]], dict[int, TensorInfo]]


@dataclass
class _Draft:
    """A plan in progress and the problems found so far.

    `found` has the layer numbers that were seen for each source pattern. `free_roots` are the first words of targets
    that the target description leaves open.
    """

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    slices: dict[str, tuple[Slice, ...]] = field(default_factory=dict)
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    uses: Counter[Rule] = field(default_factory=Counter)
    found: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    free_roots: frozenset[str] = frozenset()

    def is_free(self, target: str) -> bool:
        return target.partition(".")[0] in self.free_roots

    def add(self, status: str, name: str, detail: str) -> None:
        self.findings.setdefault((status, name), Finding(status, name, detail))


def make_plan(
    table: RuleTable,
    source_infos: Mapping[str, TensorInfo],
    target_infos: Mapping[str, TensorInfo] | None = None,
    *,
    origin: str = "the checkpoint",
    partial: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> Plan:
    """Decides where every tensor goes, from names and shapes alone.

    Args:
        table: the rules.
        source_infos: the tensors there are.
        target_infos: the tensors there must be afterwards (dtypes may differ between floating types). Without it
            every part of the table that is present at all must be complete.
        origin: name of the source in messages.
        partial: accept that whole parts are missing, even if `target_infos` has them, and parts of which it has none.
        left_out: prefixes of targets that are dropped if they are there, each with the reason.

    Raises:
        ConversionError: keys missing, unexpected, duplicated or misshapen; all of them, in one folded table.
    """
    draft = _Draft(free_roots=_free_roots(table, target_infos) if partial else frozenset())
    for (rule, layers), sources in _group_by_rule(table, source_infos, draft).items():
        _apply(rule, layers, sources, target_infos, left_out or {}, draft)
    _require_aliases_in_all_layers(table.rules, draft)
    present = [part for part in table.parts if any(rule.targets and rule in draft.uses for rule in part.rules)]
    for part in present:
        if target_infos is None or any(draft.is_free(name) and part.produces(name) for name in draft.infos):
            _require_whole(part, source_infos, draft)
    if target_infos is not None:
        wanted = target_infos.values()
        if partial:
            units = {table.unit_of(name) for name in draft.infos}
            wanted = [info for info in wanted if (unit := table.unit_of(info.name)) and unit in units]
        _require_targets(table, source_infos, wanted, draft)
        for name in draft.infos:
            if name not in target_infos and not draft.is_free(name):
                draft.add("unexpected", draft.slices[name][0].source, _NO_PARAMETER)
    if draft.findings:
        what = f"{origin} does not fit the {table.model or table.family} model"
        raise ConversionError(what, list(draft.findings.values()))
    return Plan(
        table=table,
        infos=draft.infos,
        slices=draft.slices,
        ties=draft.ties,
        dropped=draft.dropped,
        uses=draft.uses,
        absent_parts=table.absent(draft.infos),
        aliases=tuple(name for name in table.aliases if name in draft.found),
    )


def _free_roots(table: RuleTable, target_infos: Mapping[str, TensorInfo] | None) -> frozenset[str]:
    """Returns the first words of targets of which `target_infos` has none, nor any of their part."""
    described = {name.partition(".")[0] for name in target_infos or ()}
    keys = {part.key for name in target_infos or () if (part := table.part_of(name))}
    free = set()
    if target_infos is not None:
        for part in table.parts:
            roots = {target.partition(".")[0] for rule in part.rules for target in rule.targets}
            free |= roots - described if part.key not in keys else set()
    return frozenset(free)


def _group_by_rule(table: RuleTable, source_infos: Mapping[str, TensorInfo], draft: _Draft) -> Groups:
    groups: Groups = {}
    for name, info in source_infos.items():
        claims = table.claims(name)
        if not claims:
            draft.add("unexpected", name, f"no rule of the {table.name} names knows it")
            continue
        if len(claims) > 1:
            draft.add("duplicate", name, f"consumed by {len(claims)} rules")
        rule, index, layers = claims[0]
        if isinstance(rule, Drop):
            draft.uses[rule] += 1
            draft.dropped[name] = rule.reason
            continue
        groups.setdefault((rule, layers), {})[index] = info
        draft.found.setdefault(rule.sources[index], set()).add(layers)
    return groups


def _apply(
    rule: Rule,
    layers: tuple[int, ...],
    sources: Mapping[int, TensorInfo],
    target_infos: Mapping[str, TensorInfo] | None,
    left_out: Mapping[str, str],
    draft: _Draft,
) -> None:
    ordered = [sources[index] for index in sorted(sources)]
    names = [pattern.fill(layers) for pattern in rule.target_patterns]
    reason = next((why for prefix, why in left_out.items() if all(name.startswith(prefix) for name in names)), None)
    if reason:
        draft.dropped |= {info.name: reason for info in ordered}
        for index in sources:
            draft.found[rule.sources[index]].discard(layers)
        return
    draft.uses[rule] += 1
    if target_infos is not None and not any(name in target_infos or draft.is_free(name) for name in names):
        for info in ordered:
            draft.add("unexpected", info.name, _NO_PARAMETER)
        for index in sources:
            draft.found[rule.sources[index]].discard(layers)
        return
    absent = [pattern for index, pattern in enumerate(rule.needed_patterns) if index not in sources]
    for pattern in absent:
        draft.add("missing", pattern.fill(layers), "expected in the checkpoint")
    if absent:
        return
    try:
        produced = rule.produce(ordered, names)
    except ShapeConflict as conflict:
        for finding in conflict.findings:
            draft.add(finding.status, finding.name, finding.detail)
        return
    for info, slices in produced:
        if info.name in draft.infos:
            other = fold_name(draft.slices[info.name][0].source)
            draft.add("duplicate", ordered[0].name, f"{fold_name(info.name)} comes from {other} already")
        draft.infos[info.name] = info
        draft.slices[info.name] = slices
        if len(ordered) > len(rule.needed_patterns):
            draft.ties[info.name] = tuple(alias.name for alias in ordered[len(rule.needed_patterns) :])


def _require_aliases_in_all_layers(rules: Iterable[Rule], draft: _Draft) -> None:
    for rule in rules:
        layers = draft.found.get(rule.sources[0], set())
        for pattern in rule.source_patterns[len(rule.needed_patterns) :]:
            there = draft.found.get(pattern.text, set()) & layers
            if not there or there == layers:
                continue
            if 2 * len(there) < len(layers):
                for numbers in sorted(there):
                    draft.add("unexpected", pattern.fill(numbers), "not there in the other layers")
            else:
                for numbers in sorted(layers - there):
                    draft.add("missing", pattern.fill(numbers), "there in the other layers")


def _require_whole(part: Part, source_infos: Mapping[str, TensorInfo], draft: _Draft) -> None:
    """Finds missing tensors of a part, and tensors of layers behind its last one."""
    patterns = (pattern for rule in part.rules if rule.targets for pattern in rule.needed_patterns)
    needed = [pattern for pattern in patterns if not pattern.is_open]
    seen = {pattern: draft.found.get(pattern.text, set()) for pattern in needed}
    num_layers = _num_layers({pattern: found for pattern, found in seen.items() if pattern.num_layers})
    for pattern, found in seen.items():
        stray = {numbers for numbers in found if numbers and numbers[0] >= num_layers}
        for numbers in sorted(stray):
            draft.add("unexpected", pattern.fill(numbers), f"the {part.name} ends with layer {num_layers - 1}")
        sizes = _sizes(pattern, num_layers, found - stray)
        if math.prod(sizes) > _MAX_TENSORS_PER_PATTERN:
            if found:
                draft.add("unexpected", pattern.fill(max(found)), f"stands for {math.prod(sizes)} tensors")
            continue
        for numbers in product(*map(range, sizes)):
            if (name := pattern.fill(numbers)) not in source_infos:
                draft.add("missing", name, f"the {part.name} is not complete without it")


def _num_layers(seen: Mapping[Pattern, set[tuple[int, ...]]]) -> int:
    """Returns the number of layers; the last layers count if half of the patterns are there."""
    counts = Counter(layer for found in seen.values() for layer in {numbers[0] for numbers in found})
    whole = [layer for layer, count in counts.items() if 2 * count >= len(seen)]
    return max(whole or counts, default=-1) + 1


def _sizes(pattern: Pattern, num_layers: int, found: set[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns how many numbers each `{}` of the pattern must have: every layer, times every further number seen."""
    if not pattern.num_layers:
        return ()
    inner = (1 + max((numbers[axis] for numbers in found), default=0) for axis in range(1, pattern.num_layers))
    return (num_layers, *inner)


def _require_targets(
    table: RuleTable, source_infos: Mapping[str, TensorInfo], targets: Iterable[TensorInfo], draft: _Draft
) -> None:
    for wanted in targets:
        name, info = wanted.name, draft.infos.get(wanted.name)
        if info is None:
            # present ones were reported with another problem
            for source in table.sources_of(name) or [name]:
                if source not in source_infos:
                    draft.add("missing", source, f"needed for {fold_name(name)}")
            continue
        for source in dict.fromkeys(part.source for part in draft.slices[name]):
            conflict = find_conflict(source, info, wanted, "the model")
            if conflict:
                draft.add(conflict.status, source, conflict.detail)
