"""Runs a benchmark: `mindvlm-evaluate --benchmark delvm-pictures --config_path YAML --data FOLDER`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import Parser, UserError, counted
from mindvlm.datagen.benchmark_folders import MARK
from mindvlm.evaluation.answers import ANSWERS_FILE, AnswerFiles, end_last_line, share, share_files
from mindvlm.evaluation.benchmarks import benchmarks, get_benchmark
from mindvlm.evaluation.comparison import comparison_table, draw_comparison, read_panels
from mindvlm.evaluation.results import markdown, write_results
from mindvlm.models.registry import separate_parts
from mindvlm.parallel.launch import is_launched
from mindvlm.tools import cli
from mindvlm.tools.identity import identity

SECONDS_BETWEEN_LINES = 10
PACKAGES = ("mindvlm", "mindspore", "numpy", "pillow")


def build_parser(benchmark: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of the command line, with the options of a benchmark."""
    parser = Parser(
        prog="mindvlm-evaluate",
        description="Answer and score the questions of a benchmark. The same command resumes an interrupted run. Exit "
        "status 0: all questions answered; 1: some could not be; 2: nothing could be done; 130: interrupted. With "
        "--benchmark NAME --help, also show the options of the benchmark.",
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and the data that each needs")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="print the results of runs beside published figures, and draw them to --output FILE.png",
    )
    parser.add_argument("--benchmark", metavar="NAME", help="see --list")
    parser.add_argument("--data", type=os.path.expanduser, metavar="FOLDER", help="of the benchmark, see --list")
    parser.add_argument(
        "--config_path", type=os.path.expanduser, metavar="PATH", help="the model: a YAML or a checkpoint folder"
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="of answers and results (default: evaluation/NAME, with --score the folder of the file)",
    )
    parser.add_argument(
        "--score",
        nargs="+",
        type=os.path.expanduser,
        metavar="FILE",
        help="score the answers in these files; needs no --config_path",
    )
    parser.add_argument("--num_chunks", type=int, metavar="K", help="answer one of K contiguous shares, without scores")
    parser.add_argument("--chunk_idx", type=int, metavar="I", help="number of the share, from 0")
    add_runtime_options(parser)
    if benchmark:
        get_benchmark(benchmark).add_options(parser.add_argument_group(f"options of {benchmark}"))
    return parser


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that override keys of the YAML."""
    runtime = parser.add_argument_group("runtime (override the YAML)")
    runtime.add_argument("--checkpoint", type=os.path.expanduser, metavar="FILE", help="weights")
    for key, text in separate_parts().items():
        runtime.add_argument(f"--{key}", type=os.path.expanduser, metavar="FOLDER", help=text)
    runtime.add_argument("--device", choices=["auto", "cpu", "ascend"])
    runtime.add_argument("--mode", choices=["graph", "pynative"])
    cli.add_weights_option(runtime)


def runtime_overrides(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the options of `add_runtime_options` as overrides of the YAML."""
    keys = ("checkpoint", *separate_parts())
    overrides = {key: str(Path(value).resolve()) for key in keys if (value := getattr(arguments, key))}
    return overrides | {key: value for key in ("device", "mode", "weights") if (value := getattr(arguments, key))}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-evaluate`; returns the exit status."""
    return cli.run(evaluate, argv)


def evaluate(argv: list[str] | None) -> int:
    chooser = Parser(prog="mindvlm-evaluate", add_help=False)
    chooser.add_argument("--benchmark")
    arguments = build_parser(chooser.parse_known_args(argv)[0].benchmark).parse_args(argv)
    if arguments.list:
        for name, benchmark in benchmarks().items():
            print(f"{name}: {benchmark.summary}\n    --data: {benchmark.needs}")
        return 0
    if arguments.compare:
        return compare(arguments)
    check(arguments)
    benchmark = get_benchmark(arguments.benchmark)
    questions = benchmark.open(Path(arguments.data), arguments)
    errors: dict[str, str] = {}
    if arguments.score:
        files = AnswerFiles(arguments.benchmark, None, questions, lenient=getattr(arguments, "compat", False))
        source = Path(arguments.score[0]).parent
        output = Path(arguments.output) if arguments.output else source
        for path in arguments.score:
            files.read(Path(path))
    else:
        source = output = Path(arguments.output or Path("evaluation", arguments.benchmark))
        found = answer_questions(arguments, benchmark.output, questions, output)
        if found is None:
            return 0
        files, errors = found
    if not files.answers:
        raise UserError(f"{', '.join(arguments.score or [str(output)])}: holds no answers; nothing was scored")
    make_folder(output)
    scores = questions.score(files.answers, source, output)
    notes = [*files.notes, *scores.notes]
    run = {
        "benchmark": arguments.benchmark,
        "model": files.model_id or next(iter(files.models), ""),
        "data": str(arguments.data),
        **questions.settings,
        **({"compat": True} if getattr(arguments, "compat", False) else {}),
        **({"drawn": True} if (Path(arguments.data) / MARK).exists() else {}),
        "questions": len(questions.ids),
        "answered": len(files.answers),
        **({"cannot be answered": ", ".join(errors)} if errors else {}),
        **({"notes": "; ".join([*notes, *scores.remarks])} if notes or scores.remarks else {}),
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }
    write_results(output, scores, run)
    print(markdown(scores))
    for text in notes:
        cli.say(f"warning: {text}")
    for text in scores.remarks:
        cli.say(f"note: {text}")
    for path in scores.files:
        cli.say(f"written: {path}")
    cli.say(f"results: {output / 'results.md'} and results.json")
    return 1 if notes or errors else 0


def compare(arguments: argparse.Namespace) -> int:
    """Prints and draws the results of runs beside published figures."""
    if arguments.output and not arguments.output.lower().endswith(".png"):
        raise UserError(f"--output {arguments.output}: expected a name that ends in .png with --compare")
    panels = read_panels([Path(path) for path in arguments.compare])
    print(comparison_table(panels), end="")
    if arguments.output:
        check_writable(arguments.output)
        figure = draw_comparison(panels)
        with atomic_file(arguments.output) as file:
            figure.savefig(file, format="png")
        cli.say(f"written: {arguments.output}")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError if options are missing or contradict each other."""
    for name in ("benchmark", "data", *(() if arguments.score else ("config_path",))):
        if not getattr(arguments, name):
            raise UserError(f"--{name} is missing; give it, see mindvlm-evaluate --list and --help")
    if arguments.score and is_launched():
        raise UserError("--score runs in one process; start it without msrun")
    if arguments.score and arguments.config_path:
        raise UserError("--score uses no model; leave --config_path out")
    shares = (arguments.num_chunks, arguments.chunk_idx)
    if shares == (None, None):
        return
    if None in shares or not 0 <= arguments.chunk_idx < arguments.num_chunks:
        raise UserError(
            f"--num_chunks is {shares[0]} and --chunk_idx {shares[1]}; expected both, the second from 0 to below the "
            "first"
        )
    if arguments.score or is_launched():
        other = "--score" if arguments.score else "msrun, which divides the questions itself"
        raise UserError(f"--num_chunks has no effect with {other}; leave it out")


def answer_questions(
    arguments: argparse.Namespace, wanted: str, questions: Any, output: Path
) -> tuple[AnswerFiles, dict[str, str]] | None:
    """Answers the questions of this process that have no answer yet.

    Returns all answers, and errors by question id; None if another process scores or other shares are open.

    Raises:
        UserError: the model generates something else, its weights cannot be used, or the folder holds answers that are
            not to these questions.
    """
    from mindvlm.models.registry import get_family
    from mindvlm.models.run_config import read_config

    overrides = runtime_overrides(arguments)
    config = read_config(arguments.config_path, overrides)
    family = get_family(config.family)
    if family.output != wanted:
        raise UserError(
            f"--benchmark {arguments.benchmark} asks for {wanted} but {arguments.config_path} generates "
            f"{family.output}; choose another model or benchmark"
        )

    def load() -> Any:
        cli.import_library()
        import mindvlm

        return mindvlm.load(arguments.config_path, replicas=True, **overrides)

    new_files = partial(AnswerFiles, arguments.benchmark, identity(config, family), questions)
    make_folder(output)
    # processes connect before any of them writes
    model = load() if is_launched() else None
    number, num_shares, writes = arguments.chunk_idx or 0, arguments.num_chunks or 1, True
    if model:
        number, num_shares, writes = model.mesh.dp_rank, model.mesh.dp, model.mesh.tp_rank == 0
    own = output / (f"{num_shares}_{number}.jsonl" if num_shares > 1 else ANSWERS_FILE)
    files = read_folder(new_files(), output)
    if own.exists() and writes:
        for note in (note for note in files.notes if note.startswith(f"{own}:")):
            cli.say(f"{note}; its question is asked again")
        end_last_line(own)
    if files.answers and number == 0 and writes:
        total, verb = counted(len(questions.ids), "question"), "is" if len(questions.ids) == 1 else "are"
        cli.say(f"{output}: {len(files.answers)} of {total} {verb} answered")
    missing = [key for key in share(questions.ids, number, num_shares) if key not in files.answers]
    errors: dict[str, str] = {}
    started = shown = time.perf_counter()
    done = 0
    for found in questions.answers(model or load(), missing, output) if missing else ():
        if writes:
            files.append(own, found.answers)
        errors |= found.errors
        for question_id, error in found.errors.items():
            cli.say(f"question {question_id} cannot be answered: {error}")
        done += len(found.answers) + len(found.errors)
        now = time.perf_counter()
        if writes and (now - shown > SECONDS_BETWEEN_LINES or done == len(missing)):
            show_progress(done, len(missing), now - started)
            shown = now
    if model:
        from mindvlm.parallel.host import Ranks

        # also waits for the other processes
        errors = {key: error for one in Ranks(model.mesh).of_replicas(errors) for key, error in one.items()}
        if not model.mesh.is_first:
            return None
    elif num_shares > 1:
        cli.say(f"{own}: share {number} of {num_shares} is answered; without --num_chunks the answers are scored")
        return None
    files = read_folder(new_files(), output)
    if share_files(output):
        files.merge(output)
    return files, errors


def read_folder(files: AnswerFiles, folder: Path) -> AnswerFiles:
    """Reads the answers in a folder, of all shares."""
    merged = folder / ANSWERS_FILE
    for path in ([merged] if merged.exists() else []) + share_files(folder):
        files.read(path)
    return files


def make_folder(folder: Path) -> None:
    """Creates the folder of the results. Raises UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be created ({error.strerror}); choose another") from None
    check_writable(folder / ANSWERS_FILE)


def show_progress(done: int, total: int, seconds: float) -> None:
    """Prints finished questions, their rate and the time left."""
    from mindvlm.training.metrics_log import duration

    left = duration(seconds / done * (total - done))
    cli.say(f"{done} of {total} questions, {done / seconds:.3g} a second, {left} left")


if __name__ == "__main__":
    sys.exit(main())
