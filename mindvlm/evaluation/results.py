"""The results of a benchmark as JSON and as Markdown tables."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.evaluation.benchmark import Tables

DECIMALS = 4


def write_results(folder: Path, tables: Tables, run: Mapping[str, Any]) -> None:
    """Writes results.json and results.md. Raises UserError if they cannot be written.

    Args:
        run: benchmark, model, settings, numbers of questions and versions, for JSON.
    """
    rounded = {
        task: {row: {key: round(value, DECIMALS) for key, value in figures.items()} for row, figures in rows.items()}
        for task, rows in tables.items()
    }
    with atomic_file(folder / "results.json") as file:
        file.write(json.dumps({**run, "tasks": rounded}, indent=1, ensure_ascii=False).encode() + b"\n")
    with atomic_file(folder / "results.md") as file:
        settings = "".join(f"- {key}: {value}\n" for key, value in run.items())
        file.write(f"# {run['benchmark']}\n\n{settings}\n{markdown(tables)}".encode())


def markdown(tables: Tables) -> str:
    """Returns one table per task, with a row for each result and a column for each metric."""
    return "\n".join(f"## {task}\n\n{table(rows)}" for task, rows in tables.items())


def table(rows: dict[str, dict[str, float]]) -> str:
    metrics = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    lines = [["", *metrics]]
    lines += [[row, *(shown(figures.get(key)) for key in metrics)] for row, figures in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def shown(value: float | None) -> str:
    """Formats a figure with four significant digits, a whole number as it is."""
    if value is None or math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
