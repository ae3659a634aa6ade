"""Confidence intervals of figures by the bootstrap (Efron 1979): the same figures of resampled questions."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000
LIMITS = (2.5, 97.5)

Rows = dict[str, dict[str, float]]
"""Row -> metric -> value."""
Weighted = tuple[Any, Any, int]
"""A question, the verdict on its answer, and how often it counts."""


def confidence_intervals(
    tabulate: Callable[[Sequence[Weighted]], Rows],
    items: Sequence[Weighted],
    unit: Callable[[Any], Hashable],
    kind: Callable[[Any], Hashable],
) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns the 95 % percentile intervals of all figures that are not counts.

    Args:
        tabulate: computes the figures of items.
        items: scored questions.
        unit: returns what a question belongs to; the questions of a unit, such as a picture, are drawn together.
        kind: returns what the figures depend on besides the verdict. Equal units are drawn by their number, which is
            the same distribution and faster.
    """
    units: dict[Hashable, list[Weighted]] = {}
    for item in items:
        units.setdefault(unit(item[0]), []).append(item)
    kinds = {
        name: tuple(
            (kind(question), verdict if isinstance(verdict, Hashable) else id(verdict)) for question, verdict, _ in one
        )
        for name, one in units.items()
    }
    numbers = Counter(kinds.values())
    examples = {kinds[name]: units[name] for name in units}
    shares, rng = np.array(list(numbers.values())) / len(units), np.random.default_rng(0)
    values: dict[tuple[str, str], list[float]] = {}
    for counts in rng.multinomial(len(units), shares, NUM_RESAMPLES).tolist():
        drawn = [
            (question, verdict, count)
            for name, count in zip(numbers, counts, strict=True)
            if count
            for question, verdict, _ in examples[name]
        ]
        for row, figures in tabulate(drawn).items():
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
