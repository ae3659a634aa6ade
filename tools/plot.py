"""Draws the curves of training runs: python tools/plot.py runs/nano --output curve.png"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindvlm.core.command_line import Parser
from mindvlm.core.errors import UserError
from mindvlm.tools import cli

DEFAULT_METRICS = ("loss", "learning_rate", "cer", "edit_distance")
# the others are evaluations, of which there are few, or have no noise
SMOOTHED_METRICS = ("loss", "norm", "tokens_per_second", "seconds_per_step")
COLORS = ("#1f6fb4", "#d1601f", "#2c8a3c", "#b3283a", "#7a52a8", "#6b4a3a", "#c44fa0", "#5f5f5f")
PANEL_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 90, 24, 34, 40
FONT_FILE = "DejaVuSans.ttf"
MAX_TICKS = 6


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mindvlm-plot", description="Draw the curves of training runs as a PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or its metrics.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help=f"what to draw, one panel each (default: those of {', '.join(DEFAULT_METRICS)} that are there)",
    )
    parser.add_argument(
        "--smoothing", type=float, default=0.0, help="0 (default) to below 1: share of what came before"
    )
    parser.add_argument("--width", type=int, default=1000, help="of the picture in pixels (default 1000)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line of the plots. Returns the exit status, see `cli.run`."""
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
    runs = {name: records for name, records in read_runs(options.runs)}
    metrics = choose_metrics(runs, options.metrics)
    panels = [
        Panel(metric, {name: series(records, metric, options.smoothing) for name, records in runs.items()})
        for metric in metrics
    ]
    picture = draw(panels, options.width)
    with atomic_file(options.output) as file:
        picture.save(file, "PNG")
    cli.say(f"{options.output}: {', '.join(metrics)} of {', '.join(runs)}")
    return 0


def read_runs(paths: list[str]) -> Iterator[tuple[str, list[dict]]]:
    """Name and records of each run; runs of one name are told apart by their folders."""
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
    """What is drawn. Raises UserError for a figure that no run has."""
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
    """(step, value) of the finite values; noisy ones smoothed by an exponential mean not drawn towards zero."""
    smoothing = smoothing if metric in SMOOTHED_METRICS else 0.0
    points, mean, weight = [], 0.0, 0.0
    for record in records:
        value = record.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            mean = smoothing * mean + (1 - smoothing) * value
            weight = smoothing * weight + (1 - smoothing)
            points.append((float(record["step"]), mean / weight))
    return points


@dataclass(frozen=True)
class Panel:
    """One figure of all runs."""

    metric: str
    curves: dict[str, list[tuple[float, float]]]

    def limits(self, axis: int) -> tuple[float, float]:
        """Least and largest value on an axis, never equal."""
        values = [point[axis] for points in self.curves.values() for point in points]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low == high:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        return low, high


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`."""
    rough = (high - low) / MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(panels: list[Panel], width: int):
    """All panels below each other, as a PIL image."""
    from PIL import Image, ImageDraw

    from mindvlm.datagen.rendered_text import load_font

    picture = Image.new("RGB", (width, PANEL_HEIGHT * len(panels)), "white")
    canvas = ImageDraw.Draw(picture)
    font = load_font(FONT_FILE, 14)
    for number, panel in enumerate(panels):
        draw_panel(canvas, font, panel, (LEFT, number * PANEL_HEIGHT + TOP, width - RIGHT, PANEL_HEIGHT - BOTTOM))
    return picture


def draw_panel(canvas, font, panel: Panel, place: tuple[int, int, int, int]) -> None:
    """Axes, legend and curves of one panel; `place` is left, top, right and the height of the panel's axes."""
    left, top, right, height = place
    bottom = top + height - TOP
    x_limits, y_limits = panel.limits(0), panel.limits(1)

    def x(value: float) -> float:
        return left + (value - x_limits[0]) / (x_limits[1] - x_limits[0]) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_limits[0]) / (y_limits[1] - y_limits[0]) * (bottom - top)

    for value in ticks(*y_limits):
        canvas.line([(left, y(value)), (right, y(value))], fill="#e4e4e4")
        canvas.text((left - 8, y(value)), f"{value:.4g}", fill="#303030", font=font, anchor="rm")
    for value in ticks(*x_limits):
        canvas.line([(x(value), top), (x(value), bottom)], fill="#f0f0f0")
        canvas.text((x(value), bottom + 6), f"{value:.6g}", fill="#303030", font=font, anchor="ma")
    canvas.rectangle([left, top, right, bottom], outline="#909090")
    canvas.text((left, top - 8), panel.metric, fill="black", font=font, anchor="ls")
    end = right
    for number, (name, points) in reversed(list(enumerate(panel.curves.items()))):
        color = COLORS[number % len(COLORS)]
        canvas.text((end, top - 8), name, fill=color, font=font, anchor="rs")
        end -= font.getlength(name) + 20
        places = [(x(step), y(value)) for step, value in points]
        if len(places) > 1:
            canvas.line(places, fill=color, width=2, joint="curve")
        if len(places) < 40:
            for across, down in places:
                canvas.ellipse([across - 2, down - 2, across + 2, down + 2], fill=color)


if __name__ == "__main__":
    sys.exit(main())
