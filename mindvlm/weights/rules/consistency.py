"""Checks sizes against each other, for weights without a config.json.

The sizes of a model depend on few numbers: all axes of the hidden size must agree. An example of the model in which all
numbers differ shows which axes belong together; for each such set of axes the majority decides the size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from mindvlm.checkpoint import TensorInfo
from mindvlm.weights.rules.findings import ConversionError, Finding, find_conflict
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.table import RuleTable

Axes = tuple[int | None, ...]


def require_consistent_sizes(
    plan: Plan,
    native: RuleTable,
    example: Mapping[str, TensorInfo],
    *,
    origin: str = "the checkpoint",
    sources_of: Callable[[str], Sequence[str]] | None = None,
) -> None:
    """Checks the targets of a plan against each other.

    Args:
        plan: maps to native names.
        native: the table of native names.
        example: native tensors of a model of this kind whose numbers all differ.
        origin: name of the source in messages.
        sources_of: returns the names that findings about a native name show; by default those of the plan.

    Raises:
        ConversionError: a tensor has another number of axes, another size along one, or another kind of dtype than
            the rest of the model requires; without a majority for one size, all are named.
    """
    sources_of = sources_of or plan.sources_of
    axes = _axes_of_patterns(native, example)
    dtypes = {_pattern(native, name): info.dtype for name, info in example.items()}
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    # an example cannot show the tensors of an open pattern
    infos = {name: info for name, info in plan.infos.items() if _pattern(native, name) in axes}
    for name, info in infos.items():
        expected = axes[_pattern(native, name)]
        if len(expected) == len(info.shape):
            for axis in {(number, size) for number, size in zip(expected, info.shape, strict=True) if number}:
                votes[axis[0]][axis[1]] += 1
    sizes = {number: _settle(counts) for number, counts in votes.items()}
    findings: dict[str, Finding] = {}
    for name, info in infos.items():
        pattern = _pattern(native, name)
        finding = _find(sources_of(name)[0], info, axes[pattern], sizes, dtypes[pattern])
        if finding:
            findings.setdefault(finding.name, finding)
    if findings:
        raise ConversionError(f"{origin} does not fit together", list(findings.values()))


def require_open_tensors(
    plan: Plan, native: RuleTable, expected: Mapping[str, TensorInfo], *, origin: str = "the checkpoint"
) -> None:
    """Checks the targets of a plan below open patterns, of which an example shows none.

    Args:
        plan: maps to native names.
        native: the table of native names.
        expected: the native tensors that the sizes of the others imply.
        origin: name of the source in messages.

    Raises:
        ConversionError: a tensor is missing, unexpected or misshapen.
    """
    found, implied = (
        {name: info.shape for name, info in infos.items() if _pattern(native, name).endswith(".*")}
        for infos in (plan.infos, expected)
    )
    findings = [Finding("missing", name, "the sizes of the others imply it") for name in implied if name not in found]
    for name, shape in found.items():
        if name not in implied:
            findings.append(Finding("unexpected", name, "the sizes of the others do not imply it"))
        elif shape != implied[name]:
            findings.append(Finding("shape", name, f"{list(shape)}, expected {list(implied[name])}"))
    if findings:
        raise ConversionError(f"{origin} does not fit together", findings)


def _axes_of_patterns(native: RuleTable, example: Mapping[str, TensorInfo]) -> dict[str, Axes]:
    """Returns for each name pattern the example's size of each axis, None where it differs between layers."""
    axes: dict[str, Axes] = {}
    for name, info in example.items():
        pattern = _pattern(native, name)
        if pattern.endswith(".*"):
            continue
        known = axes.setdefault(pattern, info.shape)
        axes[pattern] = tuple(a if a == b else None for a, b in zip(known, info.shape, strict=True))
    return axes


def _pattern(native: RuleTable, name: str) -> str:
    return native.claims(name)[0][0].sources[0]


def _settle(counts: Counter[int]) -> int | None:
    """Returns the size that most tensors have, None without a majority."""
    (size, most), *others = counts.most_common(2)
    return None if others and others[0][1] == most else size


def _find(source: str, info: TensorInfo, axes: Axes, sizes: Mapping[int, int | None], dtype: str) -> Finding | None:
    if len(axes) != len(info.shape):
        return Finding("shape", source, f"{list(info.shape)}, the model has {len(axes)} axes there")
    disputed = any(number and sizes[number] is None for number in axes)
    wanted = tuple(sizes[number] if number else size for number, size in zip(axes, info.shape, strict=True))
    if disputed:
        return Finding("shape", source, f"{list(info.shape)}, another tensor requires another size")
    return find_conflict(source, info, TensorInfo(info.name, dtype, wanted), "the rest of the model")
