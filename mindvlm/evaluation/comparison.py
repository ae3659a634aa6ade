"""Results of runs beside the published figures: a table, and a picture with one panel for each benchmark."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.evaluation.benchmarks import get_benchmark
from mindvlm.evaluation.published import published
from mindvlm.evaluation.results import shown

RESULTS_FILE = "results.json"
RUN_COLOR, PUBLISHED_COLOR = "#1f6fb4", "#b9b9b9"
BAR_HEIGHT, DPI = 0.24, 100


@dataclass(frozen=True)
class Bar:
    """A figure of a model.

    Attributes:
        limits: of the confidence interval; None for published figures.
    """

    model: str
    value: float
    limits: tuple[float, float] | None = None
    is_published: bool = True

    @property
    def label(self) -> str:
        return f"{self.model} (published)" if self.is_published else self.model


Panels = dict[str, list[Bar]]
"""Benchmark -> figures, those of runs first. Of drawn data, " (drawn)" follows the name, and nothing is published."""
DRAWN = " (drawn)"


def read_panels(paths: Sequence[Path]) -> Panels:
    """Returns the figures that papers report, of runs and of published models.

    Args:
        paths: results.json of each run, or its folder.

    Raises:
        UserError: a file is no result of this tool, or has no figure that papers report.
    """
    panels: Panels = {}
    for path in paths:
        path = path / RESULTS_FILE if path.is_dir() else path
        name, bar = read_bar(path)
        bars = panels.setdefault(name, [])
        if any(other.model == bar.model for other in bars):
            bar = Bar(f"{bar.model} ({path.parent.name})", bar.value, bar.limits, bar.is_published)
        bars.append(bar)
    for name, bars in panels.items():
        bars += [Bar(model, value) for model, value in published(name).items()]
    return panels


def read_bar(path: Path) -> tuple[str, Bar]:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name, tasks, model = results["benchmark"], results["tasks"], results["model"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the --output folder of a run") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no result of mindvlm-evaluate; give the --output folder of a run") from None
    row, metric = get_benchmark(name).headline
    figures = tasks.get(name, {}).get(row, {})
    if figures.get(metric) is None:
        raise UserError(f"{path}: {name} has no figure here that papers report; leave it out")
    limits = results.get("intervals", {}).get(name, {}).get(row, {}).get(metric)
    label = model.partition("@")[0] or path.parent.resolve().name
    if results.get("blind"):
        label += ", blind"
    bar = Bar(label, figures[metric], tuple(limits) if limits else None, is_published=False)
    return name + DRAWN * bool(results.get("drawn")), bar


def comparison_table(panels: Panels) -> str:
    """Returns a Markdown table with a row for each model and a column for each benchmark; runs come first."""
    ordered = sorted((bar for bars in panels.values() for bar in bars), key=lambda bar: bar.is_published)
    lines = ["| | " + " | ".join(panels) + " |", "|---|" + "---:|" * len(panels)]
    for label in dict.fromkeys(bar.label for bar in ordered):
        found = [next((bar for bar in bars if bar.label == label), None) for bars in panels.values()]
        cells = [shown(bar.value, bar.limits) if bar else "-" for bar in found]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_comparison(panels: Panels) -> Any:
    """Returns a matplotlib figure with a panel of bars for each benchmark.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; run: pip install matplotlib") from None
    heights = [BAR_HEIGHT * len(bars) + 0.6 for bars in panels.values()]
    figure = Figure((8, sum(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (name, bars) in zip(axes, panels.items(), strict=True):
        places, values = range(len(bars)), [bar.value for bar in bars]
        errors = [
            [max(0, b.value - b.limits[0]), max(0, b.limits[1] - b.value)] if b.limits else [nan, nan] for b in bars
        ]
        colors = [PUBLISHED_COLOR if bar.is_published else RUN_COLOR for bar in bars]
        axis.barh(places, values, color=colors, xerr=list(zip(*errors, strict=True)), error_kw={"capsize": 2})
        for place, bar in zip(places, bars, strict=True):
            axis.annotate(shown(bar.value), (0, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_yticks(places, [bar.label for bar in bars], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(" ".join((name, *get_benchmark(name.removesuffix(DRAWN)).headline)), fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure
