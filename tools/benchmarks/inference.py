"""Speed and memory of answering a prompt: every contender in a process of its own, one after the other."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.core.host_memory import free_host_memory
from mindvlm.tools.benchmarks import machine
from mindvlm.tools.benchmarks.worker import OURS, Contender, Worker, check_installed
from mindvlm.tools.benchmarks.workload import Workload
from mindvlm.weights.rules.findings import format_table

GIB = 1024**3
ONCE = ("load", "compile")
"""Phases that a process runs once."""
PAGE_TOKENS = 719
"""Tokens of the answer of a page: those of MindOCR's published example of Vary-toy."""
TOWERS = Contender("torch", "float32")
"""Encodes the picture of a page for a contender that has no towers."""
RATIOS = {"decode": "decode_tokens_per_s", "prefill": "prefill_s", "vision": "vision_s", "page": "page_s"}


def run_rounds(
    workload: Workload, contenders: Sequence[Contender], *, num_rounds: int, num_passes: int, num_threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs every contender once a round, in turning order.

    Returns:
        By the name of the contender the results of `run_peer` of all rounds, one a pass; by "machine" as many times
        what `machine.probe` found at the start of the round.
    """
    results: dict[str, list[dict[str, Any]]] = {"machine": []} | {str(one): [] for one in contenders}
    for number in range(num_rounds):
        results["machine"] += [machine.probe(num_threads)] * num_passes
        first = number % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            passes = run_peer(contender, workload, num_passes=num_passes, num_threads=num_threads)
            results[str(contender)] += passes
            figures = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in passes[-1]["seconds"].items())
            print(f"round {number + 1}/{num_rounds} {contender}: {figures}", file=sys.stderr, flush=True)
    return results


def run_peer(contender: Contender, workload: Workload, *, num_passes: int, num_threads: int) -> list[dict[str, Any]]:
    """Returns one contender's seconds, values and peak bytes of every phase, and its facts, from a fresh process.

    Every pass repeats picture, prompt and answer, and has a result of its own.

    Raises:
        UserError: the process failed; its own messages have gone to standard error.
    """
    with Worker(contender, "Inference", workload, num_threads=num_threads) as worker:
        once = {phase: worker.ask(phase) for phase in ONCE}
        repeated = [phase for phase in contender.entry.phases if phase not in ONCE]
        passes = [once | {phase: worker.ask(phase) for phase in repeated} for _ in range(num_passes)]
        facts = worker.ask("describe")["value"]
    keys = {"seconds": "seconds", "values": "value", "peak_bytes": "peak_bytes"}
    return [
        facts | {field: {phase: answer[key] for phase, answer in answers.items()} for field, key in keys.items()}
        for answers in passes
    ]


def figures_of_round(results: Mapping[str, Any], name: str, number: int, num_tokens: int) -> dict[str, float]:
    """Returns the figures of a contender in one pass; a figure that it lacks is missing.

    `page_s` is composed: picture, prompt, and `PAGE_TOKENS` tokens at the measured rate. A contender without towers
    gets those of `TOWERS`.
    """
    result, probe = results[name][number], results["machine"][number]
    seconds = result["seconds"]
    figures = {f"{phase}_s": duration for phase, duration in seconds.items() if phase != "decode"}
    rate = num_tokens / seconds["decode"]
    gb_per_s = rate * result["decode_bytes"] / 1e9
    figures |= {"decode_tokens_per_s": rate, "decode_gb_per_s": gb_per_s}
    figures["of_read_bandwidth"] = gb_per_s / probe["read_gb_per_s"]
    towers = result if "vision" in seconds else results[str(TOWERS)][number] if str(TOWERS) in results else None
    if towers:
        figures["page_s"] = towers["seconds"]["vision"] + seconds["prefill"] + PAGE_TOKENS / rate
    peak = max(result["peak_bytes"].values())
    return figures | {"peak_gib": peak / GIB, "peak_over_weights": peak / result["stored_bytes"]}


def summarize(results: Mapping[str, Any], num_tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """Returns `median`, `min` and `max` over the passes of every figure of every contender and of the machine."""
    summary = {}
    for name, rounds in results.items():
        figures = rounds
        if name != "machine":
            figures = [figures_of_round(results, name, number, num_tokens) for number in range(len(rounds))]
        summary[name] = {
            figure: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for figure in figures[0]
            if (values := [one[figure] for one in figures])
        }
    return summary


def medians(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the medians alone of `summarize`."""
    return {name: {key: spread["median"] for key, spread in figures.items()} for name, figures in summary.items()}


def summary_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table with a row for each name and a column for each figure."""
    columns = list(dict.fromkeys(key for one in figures.values() for key in one))
    rows = [(name, *(f"{one[key]:.2f}" if key in one else "" for key in columns)) for name, one in figures.items()]
    return "\n".join(format_table([("", *columns), *rows], numbers=range(1, 1 + len(columns))))


def compare(results: Mapping[str, Any], figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Compares each of our formats with each other contender, and with our first format.

    Speeds are ratios (above 1: ours is faster).

    Args:
        figures: of `medians`.
    """
    names = [name for name in results if name != "machine"]
    mine = [name for name in names if name.startswith(OURS)]
    comparison: dict[str, dict[str, Any]] = {name: {} for name in mine}
    for name in mine:
        for other in (one for one in names if one not in mine[1:] and one != name):
            ours, theirs = figures[name], figures[other]
            ratios = {
                f"{ratio}_speedup": ours[key] / theirs[key] if ratio == "decode" else theirs[key] / ours[key]
                for ratio, key in RATIOS.items()
                if key in ours and key in theirs
            }
            comparison[name][other] = ratios | agreement(results[name][0]["values"], results[other][0]["values"])
    return comparison


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Returns how far the logits differ and how many first tokens are equal, if both answered the same prompt."""
    expected = np.array(theirs["prefill"])
    if not expected.size:
        return {}
    error = np.linalg.norm(np.array(ours["prefill"]) - expected) / np.linalg.norm(expected)
    return {"logits_relative_error": float(error), "equal_tokens": _num_equal(ours["decode"], theirs["decode"])}


def check_machine(workload: Workload, contenders: Sequence[Contender]) -> None:
    """Refuses a run that cannot end well.

    Raises:
        UserError: a framework is not installed, or the weights do not fit into the free memory.
    """
    check_installed(contenders)
    # towers and embeddings have 16 bits even where the decoder has fewer
    value_bytes = max(max(contender.bits or 16, 16) for contender in contenders) / 8
    needed, free = workload.num_parameters * value_bytes * 1.3, free_host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the model needs about {needed / GIB:.1f} GiB of memory but {free / GIB:.1f} GiB are free; "
            "end other programs, choose a smaller --model or fewer --layers, or leave out formats of many bits"
        )


def comparison_lines(comparison: Mapping[str, Mapping[str, Any]], bits: Mapping[str, int | None]) -> list[str]:
    """Returns a line for each pair of contenders whose weights have as many bits, and for two formats of ours.

    Our 16-bit weights are computed in float32, so they are compared with those of 32 bits too.
    """
    lines = []
    for name, others in comparison.items():
        for other, figures in others.items():
            is_ours = other.startswith(OURS)
            if is_ours or bits[name] in (bits[other], None) or (bits[name], bits[other]) == (16, 32):
                ratios = ", ".join(
                    f"{key} {figures[f'{key}_speedup']:.2f}x" for key in RATIOS if f"{key}_speedup" in figures
                )
                lines.append(f"{name} against {other}: {ratios}")
                if "equal_tokens" in figures:
                    error = figures["logits_relative_error"]
                    lines[-1] += f"; logits differ by {error:.1e}, first {figures['equal_tokens']} tokens equal"
    return lines


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))
