"""Where the tensors of a conversion come from, followed through its stages by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mindvlm.weights.rules.plan import Plan


@dataclass(frozen=True)
class Origin:
    """Tensors of one source that a tensor is made of."""

    source: int
    names: tuple[str, ...]


def origins_of(names: Iterable[str], source: int) -> dict[str, tuple[Origin, ...]]:
    """Return the origins of the tensors of a source: each comes from itself."""
    return {name: (Origin(source, (name,)),) for name in names}


def carry_origins(origins: Mapping[str, Sequence[Origin]], plan: Plan) -> dict[str, tuple[Origin, ...]]:
    """Return the origins of a plan's targets, given those of the tensors that it reads."""
    return {
        target: _joined(origin for source in plan.sources_of(target) for origin in origins[source])
        for target in plan.infos
    }


def add_origins(
    origins: Mapping[str, Sequence[Origin]], changed: Mapping[str, Sequence[str]], source: int
) -> dict[str, tuple[Origin, ...]]:
    """Return `origins` with tensors of another source added to those that it changed: `MergedSource.merged`."""
    added = {name: (Origin(source, tuple(keys)),) for name, keys in changed.items()}
    return {name: _joined((*found, *added.get(name, ()))) for name, found in origins.items()}


def _joined(origins: Iterable[Origin]) -> tuple[Origin, ...]:
    """One origin per source, in order of appearance, each name once."""
    names: dict[int, dict[str, None]] = {}
    for origin in origins:
        names.setdefault(origin.source, {}).update(dict.fromkeys(origin.names))
    return tuple(Origin(source, tuple(found)) for source, found in names.items())
