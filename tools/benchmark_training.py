"""Time and memory of our training step beside the torch reference's, step by step in turn on the same machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.tools.benchmark_scaling import describe as describe_scaling
from mindvlm.tools.benchmark_scaling import scaling
from mindvlm.tools.benchmark_training_worker import TRAINING_PEERS
from mindvlm.tools.benchmark_training_workload import TrainingWorkload, training_workload

OURS = "mindvlm"
GIB = 1024**3
# A training graph of this depth is compiled besides, to see how long that takes.
DEEP_LAYERS = 24
NUM_WARM_UP_STEPS = 2


class Worker:
    """A contender's process. A context manager, which ends it."""

    def __init__(self, name: str, workload: TrainingWorkload, *, num_threads: int):
        self.name = name
        self.folder = tempfile.TemporaryDirectory()
        job = {"peer": name, "workload": dataclasses.asdict(workload), "num_threads": num_threads}
        path = Path(self.folder.name, "job.json")
        path.write_text(json.dumps(job))
        entry = TRAINING_PEERS[name]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mindvlm.tools.benchmark_training_worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.__stderr__,
            text=True,
            env=os.environ | entry.environment | {"OMP_NUM_THREADS": str(num_threads)},
        )

    def ask(self, command: str) -> dict[str, Any]:
        """The process's answer. Raises UserError if it has ended."""
        try:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise UserError(
                f"peer {self.name} ended with status {status}; its messages are above (killed: out of memory?)"
            )
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def run(workload: TrainingWorkload, peers: Sequence[str], *, num_steps: int, num_threads: int) -> dict[str, Any]:
    """For each peer its preparation and its steps, the peers taking turns after a warm-up.

    Taking turns lets whatever else the machine does slow down all of them alike.
    """
    results = {}
    workers = {name: Worker(name, workload, num_threads=num_threads) for name in peers}
    try:
        for name, worker in workers.items():
            results[name] = worker.ask("prepare") | {"steps": []}
        for number in range(NUM_WARM_UP_STEPS + num_steps):
            for name, worker in workers.items():
                results[name]["steps"].append(worker.ask("step"))
            figures = ", ".join(f"{name} {results[name]['steps'][-1]['seconds']:.2f} s" for name in workers)
            print(f"step {number + 1}/{NUM_WARM_UP_STEPS + num_steps}: {figures}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.__exit__()
    return results


def deep_compile(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What compiling the training graph of `DEEP_LAYERS` decoder layers took, see `measured`."""
    workload = training_workload(name, seed=options.seed, num_layers=DEEP_LAYERS, recompute=options.recompute)
    with Worker(OURS, workload, num_threads=options.threads) as worker:
        return worker.ask("prepare")["compile"]


def summarize(results: Mapping[str, Any], workload: TrainingWorkload) -> dict[str, dict[str, float]]:
    """Medians over the steps after the warm-up, per peer; memory is the peak of the process."""
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
    """Ours over each other one (below 1: ours is faster or smaller), and how far the losses are apart."""
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


def benchmark_training(options: argparse.Namespace, format_table) -> dict[str, Any]:
    """Runs what the command line asks for, prints the report, returns it for the file.

    Args:
        options: model, against, only, steps, threads, seed, processes, recompute.
        format_table: makes text of a summary.
    """
    name = "smoke" if options.model == "smoke" else "small"
    workload = training_workload(name, seed=options.seed, recompute=options.recompute)
    peers = [options.only] if options.only else [OURS, *options.against]
    results = run(workload, peers, num_steps=options.steps, num_threads=options.threads)
    summary = summarize(results, workload)
    comparison = compare(results, summary) if OURS in results else {}
    deep = deep_compile(name, options) if OURS in results else None
    scaled = None
    if OURS in results and options.processes > 1:
        scaled = scaling(
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
    print(format_table(summary))
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
    for line in describe_scaling(scaled) if scaled else ():
        print(line)
    return {
        "summary": summary,
        "comparison": comparison,
        "deep_compile": deep,
        "scaling": scaled,
        "peers": results,
        "num_parameters": workload.num_parameters,
    }
