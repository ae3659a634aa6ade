"""Confidence intervals of figures by the bootstrap (Efron 1979): the same figures of resampled questions."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000
LIMITS = (2.5, 97.5)

Rows = dict[str, dict[str, float]]
"""Row -> metric -> value."""


def confidence_intervals(
    tabulate: Callable[[Sequence[Any]], Rows], items: Sequence[Any], unit: Callable[[Any], Hashable]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns the 95 % percentile intervals of all figures that are not counts.

    Args:
        tabulate: computes the figures of items.
        items: scored questions.
        unit: returns what an item belongs to; the items of a unit, such as a picture, are drawn together.
    """
    units: dict[Hashable, list[Any]] = {}
    for item in items:
        units.setdefault(unit(item), []).append(item)
    drawn, rng = list(units.values()), np.random.default_rng(0)
    values: dict[tuple[str, str], list[float]] = {}
    for _ in range(NUM_RESAMPLES):
        chosen = rng.integers(0, len(drawn), len(drawn)).tolist()
        for row, figures in tabulate([item for number in chosen for item in drawn[number]]).items():
            for metric, value in figures.items():
                if not isinstance(value, int):
                    values.setdefault((row, metric), []).append(value)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for (row, metric), column in values.items():
        finite = np.array(column)[np.isfinite(column)]
        if finite.size:
            low, high = np.percentile(finite, LIMITS)
            found.setdefault(row, {})[metric] = (float(low), float(high))
    return found
