"""Speed and memory of our model beside other implementations of it, on the same machine in the same run.

Every contender, a framework with one format of weights, runs in a process of its own, one after the other, with random
weights of one seed and the same prompt and pixels. The measured read bandwidth of the machine says how good a decode
step could be at best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import Parser, UserError
from mindvlm.core.weight_formats import parse_weights
from mindvlm.models.registry import FAMILIES
from mindvlm.tools import cli
from mindvlm.tools.benchmarks import growth, inference
from mindvlm.tools.benchmarks.training import benchmark_training
from mindvlm.tools.benchmarks.worker import OURS, PEERS, Contender, check_installed, parse_contenders
from mindvlm.tools.benchmarks.workload import Workload, benchmark_models

MODELS = benchmark_models(list(FAMILIES))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mindvlm-benchmark", description=__doc__.splitlines()[0])
    others = ", ".join(sorted(PEERS.keys() - {OURS}))
    small = " and ".join(name for name, model in MODELS.items() if model.is_small)
    trained = ", ".join(f"{model.trained} (--model {name})" for name, model in MODELS.items() if model.training)
    parser.add_argument(
        "--model",
        choices=sorted(MODELS),
        default=next(iter(MODELS)),
        help=f"sizes of the model (default: %(default)s); {small} run in seconds",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="PEER",
        help=f"other implementations to run: {others}, or one of their formats, such as llamacpp:q4_0",
    )
    parser.add_argument("--only", metavar="PEER", help=f"run this one alone; also {OURS}, or {OURS}:int8")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=list(PEERS[OURS].bits),
        metavar="FORMAT",
        help=f"formats of our weights, values of the key `weights` (default: {' '.join(PEERS[OURS].bits)})",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of the decoder (default: all); fewer run sooner")
    parser.add_argument(
        "--growth",
        action="store_true",
        help="measure the decoder with prompts of 128 to 8192 tokens, and 1 to 16 of 128 at once",
    )
    parser.add_argument(
        "--folder",
        type=lambda text: Path(text).expanduser(),
        metavar="DIR",
        help="keeps the random weights for further runs (default: a temporary folder, deleted at the end)",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help=f"measure training steps of {trained}",
    )
    parser.add_argument(
        "--recompute", action="store_true", help="of --train: our step recomputes its blocks in the backward pass"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="of --train: also measure N data-parallel processes that share the threads (default 2; 1: do not)",
    )
    parser.add_argument("--steps", type=int, default=10, help="training steps per implementation (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (default 3)")
    parser.add_argument("--passes", type=int, default=3, help="picture, prompt and answer in a process (default 3)")
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
    for flag in ("rounds", "passes", "tokens", "threads", "steps", "processes"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)}: must be at least 1")
    kind = "train_" if options.train else "growth_" if options.growth else ""
    options.json = options.json or Path(f"benchmark_{kind}{options.model}.json")
    check_writable(options.json)
    contenders = chosen_contenders(options)
    check_installed(contenders)
    measure = measure_training if options.train else measure_growth if options.growth else measure_inference
    report = measure(options, contenders)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    with atomic_file(options.json) as file:
        file.write(json.dumps({"settings": settings} | report, indent=1).encode())
    return 0


def chosen_contenders(options: argparse.Namespace) -> list[Contender]:
    """Returns the contenders of a run; a training step has float32 weights.

    Raises:
        UserError: one does not exist.
    """
    for text in options.weights:
        parse_weights(text)
    others = (
        parse_contenders([options.only] if options.only else options.against) if options.only or options.against else []
    )
    if options.train:
        peers = dict.fromkeys(one.peer for one in others)
        return [Contender(peer, "float32") for peer in (peers if options.only else {OURS: None} | peers)]
    return others if options.only else [*(Contender(OURS, text) for text in options.weights), *others]


def measure_training(options: argparse.Namespace, contenders: Sequence[Contender]) -> dict[str, Any]:
    make_workload = MODELS[options.model].training
    if make_workload is None:
        trained = " or ".join(name for name, model in MODELS.items() if model.training)
        raise UserError(f"--train --model {options.model}: has no training benchmark; give {trained}")
    return benchmark_training(make_workload, options, contenders)


def measure_growth(options: argparse.Namespace, contenders: Sequence[Contender]) -> dict[str, Any]:
    with prepared_workload(options, contenders) as workload:
        figures = growth.run_growth(workload, contenders, num_rounds=options.rounds, num_threads=options.threads)
    print(f"{title(workload, options)}, {workload.num_tokens} tokens at each point")
    print(*growth.growth_tables(figures), sep="\n\n")
    return {"growth": figures}


def measure_inference(options: argparse.Namespace, contenders: Sequence[Contender]) -> dict[str, Any]:
    with prepared_workload(options, contenders) as workload:
        results = inference.run_rounds(
            workload,
            contenders,
            num_rounds=options.rounds,
            num_passes=options.passes,
            num_threads=options.threads,
        )
    summary = inference.summarize(results, workload.num_tokens)
    figures = inference.medians(summary)
    comparison = inference.compare(results, figures)
    print(f"{title(workload, options)}, prompt of {workload.prompt_ids.shape[1]} tokens with one image,")
    print(f"{workload.num_tokens} greedy tokens; a page is composed of the stages, with {inference.PAGE_TOKENS} tokens")
    for contender in contenders:
        print(f"{contender}: {results[str(contender)][0]['text']}")
    machine = figures.pop("machine")
    read, flops = machine["read_gb_per_s"], machine["gemm_gflops"]
    print(f"machine: reads {read:.1f} GB/s, multiplies {flops:.0f} GFLOP/s in float32")
    print(inference.summary_table(figures))
    print(*inference.comparison_lines(comparison, {str(one): one.bits for one in contenders}), sep="\n")
    return {
        "summary": summary,
        "comparison": comparison,
        "rounds": results,
        "bits": {str(one): one.bits for one in contenders},
        "num_parameters": workload.num_parameters,
    }


@contextlib.contextmanager
def prepared_workload(options: argparse.Namespace, contenders: Sequence[Contender]) -> Iterator[Workload]:
    """Yields the workload of the command line with its files.

    Raises:
        UserError: the machine lacks memory or disk for it, or the decoder has fewer layers.
    """
    model = MODELS[options.model]
    config = model.config()
    if options.layers is not None:
        if not 1 <= options.layers <= config["num_hidden_layers"]:
            raise UserError(f"--layers {options.layers}: the decoder has 1 to {config['num_hidden_layers']}")
        config["num_hidden_layers"] = options.layers
    workload = model.workload(config, options.seed, options.tokens)
    inference.check_machine(workload, contenders)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mindvlm-benchmark-")))
        folder.mkdir(parents=True, exist_ok=True)
        cli.say(f"writing random weights to {folder}, or using those in it")
        yield workload.with_files(folder, [one.dtype for one in contenders if one.peer == "llamacpp"])


def title(workload: Workload, options: argparse.Namespace) -> str:
    """Returns the model, the threads and the repetitions in one line."""
    return (
        f"{options.model}, {workload.model_config.language_model.num_hidden_layers} layers, "
        f"{workload.num_parameters / 1e6:.1f} million parameters, {options.threads} threads, median of "
        f"{options.rounds} rounds of {options.passes} passes"
    )


if __name__ == "__main__":
    sys.exit(main())
