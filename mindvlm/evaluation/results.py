"""The results of a benchmark as JSON and as Markdown tables."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.evaluation.benchmark import Scores

DECIMALS = 4


def write_results(folder: Path, scores: Scores, run: Mapping[str, Any]) -> None:
    """Writes results.json and results.md. Raises UserError if they cannot be written.

    Args:
        run: benchmark, model, settings, numbers of questions and versions, for JSON.
    """
    figures, intervals = rounded(scores.tables), rounded(scores.intervals)
    content = {**run, "tasks": figures, **({"intervals": intervals} if intervals else {})}
    with atomic_file(folder / "results.json") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
    with atomic_file(folder / "results.md") as file:
        settings = "".join(f"- {key}: {value}\n" for key, value in run.items())
        file.write(f"# {run['benchmark']}\n\n{settings}\n{markdown(scores)}".encode())


def rounded(value: Any) -> Any:
    """Returns figures with `DECIMALS` decimals, at any depth; figures that are no numbers are None."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [rounded(one) for one in value]
    return round(value, DECIMALS) if math.isfinite(value) else None


def markdown(scores: Scores) -> str:
    """Returns one table per task, with a row for each result and a column for each metric."""
    return "\n".join(
        f"## {task}\n\n{table(rows, scores.intervals.get(task, {}))}" for task, rows in scores.tables.items()
    )


def table(rows: dict[str, dict[str, float]], intervals: dict[str, dict[str, tuple[float, float]]]) -> str:
    metrics = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    lines = [["", *metrics]]
    for row, figures in rows.items():
        limits = intervals.get(row, {})
        lines.append([row, *(shown(figures.get(key), limits.get(key)) for key in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def shown(value: float | None, limits: tuple[float, float] | None = None) -> str:
    """Formats a figure with four significant digits, a whole number as it is, and the limits of its interval."""
    if value is None or math.isnan(value):
        return "-"
    text = str(value) if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text if limits is None else f"{text} ({shown(limits[0])} to {shown(limits[1])})"
