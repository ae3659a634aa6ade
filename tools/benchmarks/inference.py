"""Speed and memory of answering a prompt: every contender in a process of its own, one after the other."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.core.host_memory import free_host_memory
from mindvlm.tools.benchmarks.worker import InferencePeer, Worker, check_installed
from mindvlm.tools.benchmarks.workload import Workload
from mindvlm.weights.rules.findings import format_table

COPY_BYTES = 256 * 1024 * 1024
GIB = 1024**3


def run_rounds(
    workload: Workload, peers: Sequence[str], *, num_rounds: int, num_threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs every peer once a round, in turning order; returns for each peer one result a round, see `run_peer`.

    Each result also has `copy_bandwidth`, measured just before it, in bytes per second.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    for number in range(num_rounds):
        for name in (*peers[number % len(peers) :], *peers[: number % len(peers)]):
            bandwidth = copy_bandwidth(num_threads)
            result = run_peer(name, workload, num_threads=num_threads)
            results[name].append(result | {"copy_bandwidth": bandwidth})
            figures = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in result["seconds"].items())
            print(f"round {number + 1}/{num_rounds} {name}: {figures}", file=sys.stderr, flush=True)
    return results


def run_peer(name: str, workload: Workload, *, num_threads: int) -> dict[str, Any]:
    """Returns one contender's seconds, values and peak bytes of every phase, from a fresh process.

    Raises:
        UserError: the process failed; its own messages have gone to standard error.
    """
    with Worker(name, "Inference", workload, num_threads=num_threads) as worker:
        answers = {phase: worker.ask(phase) for phase in InferencePeer.PHASES}
        description = worker.ask("describe")["value"]
    keys = {"seconds": "seconds", "values": "value", "peak_bytes": "peak_bytes"}
    figures = {field: {phase: answer[key] for phase, answer in answers.items()} for field, key in keys.items()}
    return figures | {"description": description}


def copy_bandwidth(num_threads: int) -> float:
    """Bytes read plus bytes written per second when all threads copy large arrays; best of five."""
    share = COPY_BYTES // num_threads
    sources = [np.ones(share, np.uint8) for _ in range(num_threads)]
    targets = [np.zeros(share, np.uint8) for _ in range(num_threads)]
    seconds = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            seconds.append(time.perf_counter() - start)
    return 2 * share * num_threads / min(seconds)


def summarize(results: dict[str, list[dict[str, Any]]], workload: Workload) -> dict[str, dict[str, float]]:
    """Returns the median over the rounds of every figure, per peer; peak memory is the largest."""
    summary = {}
    for name, rounds in results.items():
        figures = {f"{p}_s": statistics.median(r["seconds"][p] for r in rounds) for p in InferencePeer.PHASES}
        figures["vision_prefill_s"] = statistics.median(
            r["seconds"]["vision"] + r["seconds"]["prefill"] for r in rounds
        )
        rates = [workload.num_tokens / r["seconds"]["decode"] for r in rounds]
        figures["decode_tokens_per_s"] = statistics.median(rates)
        figures["decode_gb_per_s"] = figures["decode_tokens_per_s"] * workload.decode_bytes / 1e9
        figures["copy_gb_per_s"] = statistics.median(r["copy_bandwidth"] for r in rounds) / 1e9
        figures["peak_gib"] = max(max(r["peak_bytes"].values()) for r in rounds) / GIB
        figures["peak_over_parameters"] = figures["peak_gib"] * GIB / workload.parameter_bytes
        summary[name] = figures
    return summary


def summary_table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table with a row for each figure and a column for each peer."""
    figures = next(iter(summary.values()))
    rows = [(figure, *(f"{one[figure]:.2f}" for one in summary.values())) for figure in figures]
    return "\n".join(format_table([("", *summary), *rows], numbers=range(1, 1 + len(summary))))


def compare(results: dict[str, list[dict[str, Any]]], summary: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Compares the first peer with each other one: speed ratios (above 1: the first is faster), equality of results."""
    first, *others = results
    comparison = {}
    for name in others:
        mine, theirs = results[first][0]["values"], results[name][0]["values"]
        expected = np.array(theirs["prefill"])
        comparison[name] = {
            "decode_speedup": summary[first]["decode_tokens_per_s"] / summary[name]["decode_tokens_per_s"],
            "vision_prefill_speedup": summary[name]["vision_prefill_s"] / summary[first]["vision_prefill_s"],
            "logits_relative_error": float(
                np.linalg.norm(np.array(mine["prefill"]) - expected) / np.linalg.norm(expected)
            ),
            "equal_tokens": _num_equal(mine["decode"], theirs["decode"]),
        }
    return comparison


def check_machine(workload: Workload, peers: Sequence[str]) -> None:
    """Refuses a run that cannot end well.

    Raises:
        UserError: a framework is not installed, or the weights do not fit into the free memory.
    """
    for name in peers:
        check_installed(name)
    needed, free = workload.parameter_bytes * 1.3, free_host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the model needs about {needed / GIB:.1f} GiB of memory but {free / GIB:.1f} GiB are free; "
            "end other programs or choose a smaller --model"
        )


def print_comparison(comparison: dict[str, Any], *, num_tokens: int) -> None:
    for name, figures in comparison.items():
        print(
            f"against {name}: decode {figures['decode_speedup']:.2f}x, vision+prefill "
            f"{figures['vision_prefill_speedup']:.2f}x, logits differ by {figures['logits_relative_error']:.1e}, "
            f"first {figures['equal_tokens']} of {num_tokens} tokens equal"
        )


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))
