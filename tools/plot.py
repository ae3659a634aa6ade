"""Draws the curves of training runs, or reports of the benchmark: python tools/plot.py runs/nano --output curve.png"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mindvlm.core.errors import Parser, UserError
from mindvlm.tools import cli

DEFAULT_METRICS = ("loss", "learning_rate", "cer", "edit_distance", "val_loss")
# other metrics are evaluations, which are few, or have no noise
SMOOTHED_METRICS = ("loss", "norm", "tokens_per_second", "seconds_per_step")
COLORS = ("#1f6fb4", "#d1601f", "#2c8a3c", "#b3283a", "#7a52a8", "#6b4a3a", "#c44fa0", "#5f5f5f")
PANEL_HEIGHT, DPI = 300, 100
MAX_MARKED_POINTS = 40


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mindvlm-plot", description="Draw training runs or benchmarks as a PNG.")
    parser.add_argument(
        "runs",
        nargs="+",
        type=os.path.expanduser,
        metavar="RUN",
        help="output_dir of a run, or its metrics.jsonl; or the .json of a mindvlm-benchmark",
    )
    parser.add_argument("--output", type=os.path.expanduser, required=True, metavar="FILE.png")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help=f"metrics to draw, one panel each (default: those of {', '.join(DEFAULT_METRICS)} that a run has)",
    )
    parser.add_argument("--smoothing", type=float, default=0.0, help="weight of earlier values, 0 (default) to below 1")
    parser.add_argument("--width", type=int, default=1000, help="of the picture in pixels (default 1000)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status, see `cli.run`."""
    return cli.run(plot, argv)


def plot(argv: list[str] | None) -> int:
    """Reads the runs and writes the picture."""
    options = build_parser().parse_args(argv)
    if not 0 <= options.smoothing < 1:
        raise UserError(f"--smoothing is {options.smoothing}; expected 0 to below 1")
    if options.width < 300:
        raise UserError(f"--width is {options.width}; expected at least 300")
    if not options.output.lower().endswith(".png"):
        raise UserError(f"--output {options.output}: expected a name that ends in .png")
    from mindvlm.checkpoint import atomic_file, check_writable

    check_writable(options.output)
    if all(run.endswith(".json") for run in options.runs):
        figure, content = draw_reports(options.runs), "benchmark"
    else:
        runs = dict(read_runs(options.runs))
        metrics = choose_metrics(runs, options.metrics)
        panels = {
            metric: {name: series(records, metric, options.smoothing) for name, records in runs.items()}
            for metric in metrics
        }
        figure, content = draw(panels, options.width), f"{', '.join(metrics)} of {', '.join(runs)}"
    with atomic_file(options.output) as file:
        figure.savefig(file, format="png")
    cli.say(f"{options.output}: {content}")
    return 0


def draw_reports(paths: list[str]):
    """Returns a matplotlib figure with three panels for each report of the benchmark."""
    from mindvlm.tools.benchmarks.figure import PANEL_HEIGHT as HEIGHT
    from mindvlm.tools.benchmarks.figure import PANEL_WIDTH as WIDTH
    from mindvlm.tools.benchmarks.figure import panels, read_report

    drawn = panels([read_report(path) for path in paths])
    figure = new_figure(3 * WIDTH, len(drawn) // 3 * HEIGHT)
    for axes, (draw_panel, report) in zip(figure.subplots(len(drawn) // 3, 3).flat, drawn, strict=True):
        draw_panel(axes, report)
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def read_runs(paths: list[str]) -> Iterator[tuple[str, list[dict]]]:
    """Yields the name and records of each run; runs of the same name get a number."""
    from mindvlm.training.metrics_log import METRICS_FILE, read_metrics

    files = [Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path) for path in paths]
    for number, file in enumerate(files):
        records = read_metrics(file)
        if not records:
            raise UserError(f"{file}: holds no record yet; wait for the first log line")
        name = file.resolve().parent.name
        alike = [other for other in files if other.resolve().parent.name == name]
        yield (name if len(alike) == 1 else f"{name} ({number + 1})"), records


def choose_metrics(runs: dict[str, list[dict]], wanted: list[str] | None) -> list[str]:
    """Returns the metrics to draw. Raises UserError for one that no run has."""
    there = {
        key
        for records in runs.values()
        for record in records
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }
    if not wanted:
        return [metric for metric in DEFAULT_METRICS if metric in there]
    for metric in wanted:
        if metric not in there:
            raise UserError(f"--metrics {metric}: no run has it; expected one of {', '.join(sorted(there))}")
    return wanted


def series(records: list[dict], metric: str, smoothing: float) -> list[tuple[float, float]]:
    """Returns (step, value) of the finite values; noisy metrics as an exponential mean without bias to zero."""
    smoothing = smoothing if metric in SMOOTHED_METRICS else 0.0
    points, mean, weight = [], 0.0, 0.0
    for record in records:
        value = record.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            mean = smoothing * mean + (1 - smoothing) * value
            weight = smoothing * weight + (1 - smoothing)
            points.append((float(record["step"]), mean / weight))
    return points


def draw(panels: dict[str, dict[str, list[tuple[float, float]]]], width: int):
    """Returns a matplotlib figure with one panel a metric, below each other.

    Args:
        panels: for each metric, the (step, value) points of each run.
        width: in pixels.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = new_figure(width, PANEL_HEIGHT * len(panels))
    for axes, (metric, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for number, (name, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) < MAX_MARKED_POINTS else ""
            color = COLORS[number % len(COLORS)]
            axes.plot(steps, values, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=name)
        axes.set_title(metric, loc="left", fontsize="medium")
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(curves), frameon=False, fontsize="small")
    axes.set_xlabel("step")
    return figure


def new_figure(width: int, height: int):
    """Returns an empty matplotlib figure of this size in pixels. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("plots need matplotlib, which is not installed; run: pip install matplotlib") from None
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")


if __name__ == "__main__":
    sys.exit(main())
