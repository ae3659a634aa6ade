"""Time and memory of our training step beside the torch reference's, step by step in turn on the same machine."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mindvlm.tools.benchmarks import scaling
from mindvlm.tools.benchmarks.inference import GIB, summary_table
from mindvlm.tools.benchmarks.worker import OURS, Contender, Worker

DEEP_LAYERS = 24
"""Decoder layers of a further training graph that is only compiled, to see how long that takes."""
NUM_WARM_UP_STEPS = 2


def run_in_turn(workload: Any, contenders: Sequence[Contender], *, num_steps: int, num_threads: int) -> dict[str, Any]:
    """Returns for each peer its preparation and its steps, which the peers take in turn.

    Taking turns lets whatever else the machine does slow down all of them alike.
    """
    results = {}
    with contextlib.ExitStack() as stack:
        workers = {
            one.peer: stack.enter_context(Worker(one, "Training", workload, num_threads=num_threads))
            for one in contenders
        }
        for name, worker in workers.items():
            results[name] = prepare(worker) | {"steps": []}
        for number in range(NUM_WARM_UP_STEPS + num_steps):
            for name, worker in workers.items():
                results[name]["steps"].append(worker.ask("step"))
            figures = ", ".join(f"{name} {results[name]['steps'][-1]['seconds']:.2f} s" for name in workers)
            print(f"step {number + 1}/{NUM_WARM_UP_STEPS + num_steps}: {figures}", file=sys.stderr, flush=True)
    return results


def prepare(worker: Worker) -> dict[str, Any]:
    """Loads and compiles; returns what each took and the description of the contender."""
    load, compiled = worker.ask("load"), worker.ask("compile")
    return {"load": load, "compile": compiled, "description": worker.ask("describe")["value"]}


def deep_compile(make_workload: Callable[..., Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns what compiling the training graph of `DEEP_LAYERS` decoder layers took, see `measured`."""
    workload = make_workload(seed=options.seed, num_layers=DEEP_LAYERS, recompute=options.recompute)
    with Worker(Contender(OURS, "float32"), "Training", workload, num_threads=options.threads) as worker:
        return prepare(worker)["compile"]


def summarize(results: Mapping[str, Any], workload: Any) -> dict[str, dict[str, float]]:
    """Returns medians over the steps after the warm-up, per peer; memory is the peak of the process."""
    summary = {}
    for name, result in results.items():
        steps = result["steps"][NUM_WARM_UP_STEPS:]
        seconds = statistics.median(step["seconds"] for step in steps)
        summary[name] = {
            "compile_s": result["compile"]["seconds"],
            "step_s": seconds,
            "fastest_step_s": min(step["seconds"] for step in steps),
            "processor_s": statistics.median(step["processor_seconds"] for step in steps),
            "tokens_per_s": workload.tokens_per_step / seconds,
            "peak_gib": steps[-1]["peak_bytes"] / GIB,
        }
    return summary


def compare(results: Mapping[str, Any], summary: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns ours over each other one (below 1: ours is faster or smaller), and how far the losses differ."""
    comparison = {}
    mine = [step["value"] for step in results[OURS]["steps"]]
    for name in results:
        if name == OURS:
            continue
        theirs = [step["value"] for step in results[name]["steps"]]
        comparison[name] = {
            f"{figure}_ratio": summary[OURS][key] / summary[name][key]
            for figure, key in (
                ("step", "step_s"),
                ("fastest_step", "fastest_step_s"),
                ("processor", "processor_s"),
                ("peak", "peak_gib"),
            )
        }
        differences = (abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
        comparison[name]["loss_relative_difference"] = max(differences)
    return comparison


def benchmark_training(
    make_workload: Callable[..., Any], options: argparse.Namespace, contenders: Sequence[Contender]
) -> dict[str, Any]:
    """Runs what the command line asks for, prints the report and returns it for the JSON file.

    Args:
        make_workload: see `BenchmarkModel.training`.
        options: steps, threads, seed, processes, recompute.
    """
    workload = make_workload(seed=options.seed, recompute=options.recompute)
    results = run_in_turn(workload, contenders, num_steps=options.steps, num_threads=options.threads)
    summary = summarize(results, workload)
    comparison = compare(results, summary) if OURS in results else {}
    deep = deep_compile(make_workload, options) if OURS in results else None
    scaled = None
    if OURS in results and options.processes > 1:
        scaled = scaling.scaling(
            workload,
            num_processes=options.processes,
            num_threads=options.threads,
            num_steps=options.steps,
            num_warm_up=NUM_WARM_UP_STEPS,
        )
    print(
        f"{workload.num_parameters / 1e6:.1f} million parameters, towers frozen, {workload.batch_size} rows of "
        f"{workload.length} tokens, {options.threads} threads, median of {options.steps} steps in turn"
    )
    for peer, result in results.items():
        print(f"{peer}: {result['description']}")
    print(summary_table(summary))
    for peer, figures in comparison.items():
        print(
            f"against {peer}: step {figures['step_ratio']:.2f}x (fastest {figures['fastest_step_ratio']:.2f}x, "
            f"processor {figures['processor_ratio']:.2f}x), peak memory {figures['peak_ratio']:.2f}x, losses differ by "
            f"{figures['loss_relative_difference']:.1e}"
        )
    if deep is not None:
        print(
            f"training graph of {DEEP_LAYERS} decoder layers compiled in {deep['seconds']:.1f} s "
            f"({deep['processor_seconds']:.1f} s of the processor)"
        )
    for line in scaling.describe(scaled) if scaled else ():
        print(line)
    return {
        "summary": summary,
        "comparison": comparison,
        "deep_compile": deep,
        "scaling": scaled,
        "peers": results,
        "num_parameters": workload.num_parameters,
    }
