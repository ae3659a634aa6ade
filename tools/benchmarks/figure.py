"""Draws reports of `mindvlm-benchmark`: speed against bits, the time of a page, memory, and growth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.tools.benchmarks.inference import PAGE_TOKENS

COLORS = {"mindvlm": "#1f6fb4", "torch": "#d1601f", "llamacpp": "#2c8a3c"}
STAGE_COLORS = {"vision": "#7a52a8", "prefill": "#c9a227", "decode": "#5f8fb4"}
LINE_STYLES = ("-", "--", ":", "-.")
PANEL_WIDTH, PANEL_HEIGHT = 500, 330


def read_report(path: str | Path) -> dict[str, Any]:
    """Returns a report of the benchmark. Raises UserError if the file is none, or one of training."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        report = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if isinstance(report, dict) and "tasks" in report:
        raise UserError(f"{path}: is a result of mindvlm-evaluate; draw it with mindvlm-evaluate --compare")
    if not isinstance(report, dict) or not ({"bits", "growth"} & report.keys()):
        raise UserError(f"{path}: is no report of mindvlm-benchmark, or one of --train, which is not drawn")
    return report


def panels(reports: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Mapping[str, Any]]]:
    """Returns (function that draws it on axes, report) of every panel."""
    of_inference = (speed_against_bits, page_times, memory)
    of_growth = (decode_against_context, prefill_against_length, decode_against_rows)
    return [(one, report) for report in reports for one in (of_inference if "bits" in report else of_growth)]


def speed_against_bits(axes: Any, report: Mapping[str, Any]) -> None:
    for peer, color in COLORS.items():
        names = [name for name in report["summary"] if peer_of(name) == peer and report["bits"][name]]
        names.sort(key=lambda name: report["bits"][name])
        rates = [report["summary"][name]["decode_tokens_per_s"] for name in names]
        bits, middle = [report["bits"][name] for name in names], [rate["median"] for rate in rates]
        spread = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        if names:
            axes.errorbar(bits, middle, spread, color=color, marker="o", markersize=4, capsize=3, label=peer)
        for name, *place in zip(names, bits, middle, strict=True):
            axes.annotate(name.partition(":")[2], place, (4, 3), textcoords="offset points", fontsize="x-small")
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes.set_ylim(0)
    axes.set_xlabel("bits of a weight of the decoder")
    axes.set_title("decode, tokens/s", loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


def page_times(axes: Any, report: Mapping[str, Any]) -> None:
    names = [name for name, figures in report["summary"].items() if "page_s" in figures]
    for row, name in enumerate(reversed(names)):
        figures = {key: spread["median"] for key, spread in report["summary"][name].items()}
        decode = PAGE_TOKENS / figures["decode_tokens_per_s"]
        towers = figures["page_s"] - figures["prefill_s"] - decode
        start = 0.0
        for (stage, color), seconds in zip(STAGE_COLORS.items(), (towers, figures["prefill_s"], decode), strict=True):
            axes.barh(row, seconds, left=start, color=color, label=stage if row == 0 else None)
            start += seconds
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize="small")
    axes.set_title(f"a page, s: picture, prompt, {PAGE_TOKENS} tokens", loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


def memory(axes: Any, report: Mapping[str, Any]) -> None:
    names = [name for name in report["summary"] if name != "machine"]
    for row, name in enumerate(reversed(names)):
        figures = report["summary"][name]
        peak = figures["peak_gib"]["median"]
        axes.barh(row, peak, color=COLORS[peer_of(name)], alpha=0.45)
        axes.barh(row, peak / figures["peak_over_weights"]["median"], color=COLORS[peer_of(name)])
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize="small")
    axes.set_title("peak memory, GiB; dark: the weights", loc="left", fontsize="medium")


def decode_against_context(axes: Any, report: Mapping[str, Any]) -> None:
    draw_growth(axes, report, of_one_row, "length", "decode_tokens_per_s")
    axes.set_xlabel("tokens in the context")
    axes.set_title("decode, tokens/s", loc="left", fontsize="medium")


def prefill_against_length(axes: Any, report: Mapping[str, Any]) -> None:
    draw_growth(axes, report, of_one_row, "length", "prefill_tokens_per_s")
    axes.set_xlabel("tokens of the prompt")
    axes.set_title("prefill, tokens/s", loc="left", fontsize="medium")


def decode_against_rows(axes: Any, report: Mapping[str, Any]) -> None:
    shortest = min(point["length"] for point in report["growth"])
    draw_growth(axes, report, lambda point: point["length"] == shortest, "rows", "decode_tokens_per_s")
    axes.set_xlabel(f"requests at once, {shortest} tokens each")
    axes.set_title("decode, tokens/s of all together", loc="left", fontsize="medium")


def of_one_row(point: Mapping[str, Any]) -> bool:
    return point["rows"] == 1


def draw_growth(axes: Any, report: Mapping[str, Any], is_shown: Any, x: str, y: str) -> None:
    """Draws a curve for each contender; formats of one peer differ by the line style."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in filter(is_shown, report["growth"]):
        curves.setdefault(point["contender"], []).append((point[x], point[y]))
    seen: dict[str, int] = {}
    for name, points in curves.items():
        peer = peer_of(name)
        style = LINE_STYLES[seen.get(peer, 0) % len(LINE_STYLES)]
        seen[peer] = seen.get(peer, 0) + 1
        axes.plot(*zip(*points, strict=True), style, color=COLORS[peer], marker="o", markersize=3.5, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({at for points in curves.values() for at, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize="small")


def peer_of(name: str) -> str:
    return name.partition(":")[0]
