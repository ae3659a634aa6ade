"""Runs a benchmark: `mindvlm-evaluate --benchmark delvm-pictures --config_path YAML --data FOLDER`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import check_writable
from mindvlm.core.errors import Parser, UserError, counted
from mindvlm.evaluation.answers import AnswersFile, missing_note
from mindvlm.evaluation.benchmarks import benchmarks, get_benchmark
from mindvlm.evaluation.results import markdown, write_results
from mindvlm.models.registry import separate_parts
from mindvlm.parallel.launch import is_launched
from mindvlm.tools import cli

ANSWERS_FILE = "answers.jsonl"
# questions that are answered together, as many as the session has slots
BATCH_SIZE = 16
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
        "--score", type=os.path.expanduser, metavar="FILE", help="score these answers; needs no --config_path"
    )
    runtime = parser.add_argument_group("runtime (override the YAML)")
    runtime.add_argument("--checkpoint", type=os.path.expanduser, metavar="FILE", help="weights")
    for key, text in separate_parts().items():
        runtime.add_argument(f"--{key}", type=os.path.expanduser, metavar="FOLDER", help=text)
    runtime.add_argument("--device", choices=["auto", "cpu", "ascend"])
    runtime.add_argument("--mode", choices=["graph", "pynative"])
    if benchmark:
        get_benchmark(benchmark).add_options(parser.add_argument_group(f"options of {benchmark}"))
    return parser


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
    if is_launched():
        raise UserError("mindvlm-evaluate runs in one process; start it without msrun")
    for name in ("benchmark", "data", *(() if arguments.score else ("config_path",))):
        if not getattr(arguments, name):
            raise UserError(f"--{name} is missing; give it, see mindvlm-evaluate --list and --help")
    if arguments.score and arguments.config_path:
        raise UserError("--score uses no model; leave --config_path out")
    benchmark = get_benchmark(arguments.benchmark)
    questions = benchmark.open(Path(arguments.data), arguments)
    errors: dict[str, str] = {}
    if arguments.score:
        file = AnswersFile(Path(arguments.score), arguments.benchmark, None, questions)
        output = Path(arguments.output) if arguments.output else file.path.parent
    else:
        output = Path(arguments.output or Path("evaluation", arguments.benchmark))
        file, errors = answer_questions(arguments, benchmark.output, questions, output)
    answers, note = file.read()
    if not answers:
        raise UserError(f"{file.path}: holds no answers; nothing was scored")
    notes = [text for text in (note, missing_note(answers, questions.ids)) if text]
    tables = questions.score(answers, file.path.parent)
    run = {
        "benchmark": arguments.benchmark,
        "model": file.model_id or "",
        "data": str(arguments.data),
        **questions.settings,
        "questions": len(questions.ids),
        "answered": len(answers),
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }
    make_folder(output)
    write_results(output, tables, run)
    print(markdown(tables))
    for text in notes:
        cli.say(f"warning: {text}")
    cli.say(f"results: {output / 'results.md'} and results.json")
    return 1 if notes or errors else 0


def answer_questions(
    arguments: argparse.Namespace, wanted: str, questions: Any, output: Path
) -> tuple[AnswersFile, dict[str, str]]:
    """Answers the questions that have no answer yet. Returns the file of answers, and errors by question id.

    Raises:
        UserError: the model generates something else, its weights cannot be used, or the folder holds answers that are
            not to these questions.
    """
    from mindvlm.models.registry import get_family
    from mindvlm.models.run_config import read_config

    keys = ("checkpoint", *separate_parts())
    overrides = {key: str(Path(value).resolve()) for key in keys if (value := getattr(arguments, key))}
    overrides |= {key: value for key in ("device", "mode") if (value := getattr(arguments, key))}
    config = read_config(arguments.config_path, overrides)
    family = get_family(config.family)
    if family.output != wanted:
        raise UserError(
            f"--benchmark {arguments.benchmark} asks for {wanted} but {arguments.config_path} generates "
            f"{family.output}; choose another model or benchmark"
        )
    file = AnswersFile(output / ANSWERS_FILE, arguments.benchmark, identity(config, family), questions)
    known: dict[str, Any] = {}
    if file.path.exists():
        known, note = file.read()
        if note:
            cli.say(f"{note}; its question is asked again")
            file.cut_unfinished_line()
        cli.say(f"{output}: {len(known)} of {counted(len(questions.ids), 'question')} are answered")
    make_folder(output)
    missing = [question_id for question_id in questions.ids if question_id not in known]
    if not missing:
        return file, {}

    import mindvlm

    model = mindvlm.load(arguments.config_path, **overrides)
    errors: dict[str, str] = {}
    started = time.perf_counter()
    for start in range(0, len(missing), BATCH_SIZE):
        found = questions.answer(model, missing[start : start + BATCH_SIZE], output)
        file.append(found.answers)
        errors |= found.errors
        for question_id, error in found.errors.items():
            cli.say(f"{question_id} cannot be answered: {error}")
        show_progress(min(start + BATCH_SIZE, len(missing)), len(missing), time.perf_counter() - started)
    return file, errors


def identity(config: Any, family: Any) -> str:
    """Returns the model's name with a digest of its weights."""
    from mindvlm.models.loading import separate_parts as parts_of
    from mindvlm.training.initial_weights import identify_weights

    if not config.checkpoint:
        raise UserError(f"config {config.name} names no checkpoint; set checkpoint to a file of weights")
    return f"{config.name}@{identify_weights([config.checkpoint, *parts_of(config, family).values()])[:12]}"


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
