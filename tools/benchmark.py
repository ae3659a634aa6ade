"""Speed and memory of our model beside other implementations of it, on the same machine in the same run.

Every contender runs in a process of its own, one after the other, on full-size random weights of one seed, with the
same prompt and pixels. The measured copy bandwidth of the machine says how good a decode step could be at best.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.command_line import Parser
from mindvlm.core.errors import UserError
from mindvlm.tools import cli
from mindvlm.tools.benchmark_stages import PEERS, STAGES
from mindvlm.tools.benchmark_training import benchmark_training
from mindvlm.tools.benchmark_workload import MODELS, Workload, make_workload

OURS = "mindvlm"
COPY_BYTES = 256 * 1024 * 1024
GIB = 1024**3


def run_benchmark(
    workload: Workload, peers: Sequence[str], *, num_rounds: int, num_threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Run every peer once a round, in turning order; returns for each peer one result a round (see `run_stages`).

    Each result also has `copy_bandwidth`, measured just before it, in bytes per second.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    for number in range(num_rounds):
        for name in (*peers[number % len(peers) :], *peers[: number % len(peers)]):
            bandwidth = copy_bandwidth(num_threads)
            result = run_peer(name, workload, num_threads=num_threads)
            results[name].append(result | {"copy_bandwidth": bandwidth})
            figures = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result["seconds"].items())
            print(f"round {number + 1}/{num_rounds} {name}: {figures}", file=sys.stderr, flush=True)
    return results


def run_peer(name: str, workload: Workload, *, num_threads: int) -> dict[str, Any]:
    """One contender's result from a fresh process.

    Raises:
        UserError: the process failed; its own messages have gone to standard error.
    """
    job = {
        "peer": name,
        "family": workload.family,
        "workload": dataclasses.asdict(workload),
        "num_threads": num_threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "mindvlm.tools.benchmark_stages", str(job_path), str(result_path)]
        environment = os.environ | PEERS[name].environment | {"OMP_NUM_THREADS": str(num_threads)}
        status = subprocess.run(command, env=environment, stdout=sys.__stderr__, check=False).returncode
        if status or not result_path.is_file():
            raise UserError(f"peer {name} ended with status {status}; its messages are above (killed: out of memory?)")
        return json.loads(result_path.read_text())


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
    """Median over the rounds of every figure, per peer; peak memory is the largest."""
    summary = {}
    for name, rounds in results.items():
        figures = {f"{s.name}_s": statistics.median(r["seconds"][s.name] for r in rounds) for s in STAGES}
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


def compare(results: dict[str, list[dict[str, Any]]], summary: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The first peer against each other one: speed ratios (above 1 = the first is faster) and whether they agree."""
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


def format_table(summary: dict[str, dict[str, float]]) -> str:
    """One row per figure, one column per peer."""
    names = list(summary)
    rows = [["", *names]]
    for figure in summary[names[0]]:
        rows.append([figure, *(f"{summary[name][figure]:.2f}" for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def check_machine(workload: Workload, peers: Sequence[str]) -> None:
    """Refuse a run that cannot end well.

    Raises:
        UserError: a framework is not installed, or the weights do not fit into the free memory.
    """
    for name in peers:
        check_installed(name)
    needed, available = workload.parameter_bytes * 1.3, available_bytes()
    if needed > available:
        raise UserError(
            f"the model needs about {needed / GIB:.1f} GiB of memory but {available / GIB:.1f} GiB are free; "
            "end other programs or choose a smaller --model"
        )


def check_installed(name: str) -> None:
    """Raises UserError if the framework of a peer is not installed."""
    package = PEERS[name].requires
    if importlib.util.find_spec(package) is None:
        raise UserError(f"peer {name} needs the package {package}, which is not installed: pip install {package}")


def available_bytes() -> int:
    """Memory that a new process could take without swapping, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mindvlm-benchmark", description=__doc__.splitlines()[0])
    others = sorted(PEERS.keys() - {OURS})
    parser.add_argument(
        "--model",
        choices=sorted(MODELS),
        default="vary_toy",
        help="sizes of the model; smoke and tinyllava_smoke run in seconds",
    )
    parser.add_argument("--against", choices=others, nargs="*", default=[], help="other implementations to run")
    parser.add_argument("--only", choices=sorted(PEERS), help="run this one alone")
    parser.add_argument(
        "--train",
        action="store_true",
        help="measure training steps of a Vary-toy of 50 million parameters (with --model smoke: a tiny one)",
    )
    parser.add_argument(
        "--recompute", action="store_true", help="of --train: our step computes its blocks again on the way back"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="of --train: also measure N data-parallel processes that share the threads (default 2; 1: do not)",
    )
    parser.add_argument("--steps", type=int, default=10, help="training steps per implementation (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per implementation (default 3)")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens to decode (default 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pixels")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where every figure of every round goes (default: benchmark_MODEL.json)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `mindvlm-benchmark`; returns the exit status, see `cli.run`."""
    return cli.run(benchmark, arguments)


def benchmark(arguments: list[str] | None) -> int:
    options = parse_arguments(arguments)
    for flag in ("rounds", "tokens", "threads", "steps", "processes"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)}: must be at least 1")
    options.json = options.json or Path(f"benchmark_{'train_' if options.train else ''}{options.model}.json")
    check_writable(options.json)
    settings = {"settings": vars(options) | {"json": str(options.json)}}
    if options.train:
        if options.model not in ("vary_toy", "smoke"):
            raise UserError(f"--train --model {options.model}: measures a Vary-toy; give vary_toy or smoke")
        for name in [options.only] if options.only else [OURS, *options.against]:
            check_installed(name)
        write_report(options.json, settings | benchmark_training(options, format_table))
        return 0
    workload = make_workload(options.model, seed=options.seed, num_tokens=options.tokens)
    peers = [options.only] if options.only else [OURS, *options.against]
    check_machine(workload, peers)
    results = run_benchmark(workload, peers, num_rounds=options.rounds, num_threads=options.threads)
    summary = summarize(results, workload)
    comparison = compare(results, summary)
    print_report(options, workload, results, summary, comparison)
    report = {"summary": summary, "comparison": comparison, "rounds": results}
    write_report(options.json, settings | report | {"parameter_bytes": workload.parameter_bytes})
    return 0


def write_report(path: Path, report: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(report, indent=1).encode())


def print_report(
    options: argparse.Namespace,
    workload: Workload,
    results: dict[str, list[dict[str, Any]]],
    summary: dict[str, dict[str, float]],
    comparison: dict[str, Any],
) -> None:
    size, prompt_length = workload.parameter_bytes / GIB, workload.prompt_ids.shape[1]
    print(f"{options.model}: {size:.2f} GiB of float32 weights, prompt of {prompt_length} tokens with one image,")
    print(f"{workload.num_tokens} greedy tokens, {options.threads} threads, median of {options.rounds} rounds")
    for name, rounds in results.items():
        print(f"{name}: {rounds[0]['description']}")
    print(format_table(summary))
    for name, figures in comparison.items():
        print(
            f"against {name}: decode {figures['decode_speedup']:.2f}x, vision+prefill "
            f"{figures['vision_prefill_speedup']:.2f}x, logits differ by {figures['logits_relative_error']:.1e}, "
            f"first {figures['equal_tokens']} of {workload.num_tokens} tokens equal"
        )


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))


if __name__ == "__main__":
    sys.exit(main())
