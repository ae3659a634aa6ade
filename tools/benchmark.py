"""Speed and memory of our model beside other implementations of it, on the same machine in the same run.

Every contender runs in a process of its own, one after the other, on full-size random weights of one seed, with the
same prompt and pixels. The measured copy bandwidth of the machine says how good a decode step could be at best.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import Parser, UserError
from mindvlm.models.registry import FAMILIES
from mindvlm.tools import cli
from mindvlm.tools.benchmarks import inference
from mindvlm.tools.benchmarks.training import benchmark_training
from mindvlm.tools.benchmarks.worker import OURS, PEERS, check_installed
from mindvlm.tools.benchmarks.workload import benchmark_models

MODELS = benchmark_models(list(FAMILIES))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mindvlm-benchmark", description=__doc__.splitlines()[0])
    others = sorted(PEERS.keys() - {OURS})
    small = " and ".join(name for name, model in MODELS.items() if model.is_small)
    trained = ", ".join(f"{model.trained} (--model {name})" for name, model in MODELS.items() if model.training)
    parser.add_argument(
        "--model",
        choices=sorted(MODELS),
        default=next(iter(MODELS)),
        help=f"sizes of the model (default: %(default)s); {small} run in seconds",
    )
    parser.add_argument("--against", choices=others, nargs="*", default=[], help="other implementations to run")
    parser.add_argument("--only", choices=sorted(PEERS), help="run this one alone")
    parser.add_argument(
        "--train",
        action="store_true",
        help=f"measure training steps of {trained}",
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
        type=lambda text: Path(text).expanduser(),
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
    peers = [options.only] if options.only else [OURS, *options.against]
    report = (measure_training if options.train else measure_inference)(options, peers)
    settings = vars(options) | {"json": str(options.json)}
    with atomic_file(options.json) as file:
        file.write(json.dumps({"settings": settings} | report, indent=1).encode())
    return 0


def measure_training(options: argparse.Namespace, peers: Sequence[str]) -> dict[str, Any]:
    make_workload = MODELS[options.model].training
    if make_workload is None:
        trained = " or ".join(name for name, model in MODELS.items() if model.training)
        raise UserError(f"--train --model {options.model}: has no training benchmark; give {trained}")
    for name in peers:
        check_installed(name)
    return benchmark_training(make_workload, options)


def measure_inference(options: argparse.Namespace, peers: Sequence[str]) -> dict[str, Any]:
    model = MODELS[options.model]
    workload = model.workload(model.config(), options.seed, options.tokens)
    inference.check_machine(workload, peers)
    results = inference.run_rounds(workload, peers, num_rounds=options.rounds, num_threads=options.threads)
    summary = inference.summarize(results, workload)
    comparison = inference.compare(results, summary)
    size, prompt_length = workload.parameter_bytes / inference.GIB, workload.prompt_ids.shape[1]
    print(f"{options.model}: {size:.2f} GiB of float32 weights, prompt of {prompt_length} tokens with one image,")
    print(f"{workload.num_tokens} greedy tokens, {options.threads} threads, median of {options.rounds} rounds")
    for name, rounds in results.items():
        print(f"{name}: {rounds[0]['description']}")
    print(inference.summary_table(summary))
    inference.print_comparison(comparison, num_tokens=workload.num_tokens)
    figures = {"summary": summary, "comparison": comparison, "rounds": results}
    return figures | {"parameter_bytes": workload.parameter_bytes}


if __name__ == "__main__":
    sys.exit(main())
