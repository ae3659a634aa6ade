"""Answers of `mindvlm-predict` about many pages: printed, recorded and listed as they end."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError, counted
from mindvlm.generation.answer import Answer
from mindvlm.generation.repetition import num_repeated_tokens
from mindvlm.models.registry import get_family
from mindvlm.processing.images.documents import DEFAULT_DPI
from mindvlm.processing.images.sources import short_name
from mindvlm.tools import cli
from mindvlm.tools.answer_log import AnswerLog, stamp
from mindvlm.tools.identity import identity
from mindvlm.tools.pages import PageReader, Question
from mindvlm.tools.text_files import TextFiles

LOG_NAME = "pages.jsonl"
# an answer that ends for its length after so many tokens of a repeated sequence is listed as a loop
NUM_TOKENS_OF_LOOP = 200
NUM_LISTED = 20


def read_pages(
    model: Any, questions: Sequence[Question], arguments: argparse.Namespace, options: dict, *, must_succeed: bool
) -> int:
    """Asks the query about each question's pages; reports a bad page and continues.

    Args:
        must_succeed: whether the error of a page ends the command.

    Returns:
        0, or 1 when a page failed.

    Raises:
        UserError: a page failed that must not, or an output holds other answers, cannot be written, or is
            written by another process.
    """
    from tqdm import tqdm

    recorded = settings_of(model, arguments, options) if log_path(arguments) else {}
    # before the log, which may lie in its folder
    texts = open_texts(questions, arguments) if model.mesh.is_first else None
    log = open_log(questions, arguments, recorded, is_writer=model.mesh.is_first)
    answered = [question for question in questions if log and question.key in log.records]
    waiting = [question for question in questions if not (log and question.key in log.records)]
    failed, looped = [], [one.name for one in answered if log.records[one.key].get("stop_reason") == "repetition"]
    if log and model.mesh.is_first:
        log.start()
    if answered:
        cli.say(f"{log.path}: {len(answered)} of {counted(len(questions), 'page')} are answered")
    if texts:
        texts.start(log.records.values())
    if waiting and model.scope.note:
        cli.say(f"{model.config.name}: {model.scope.note}")
    load_seconds = model.load_seconds
    reader = PageReader(arguments.dpi, model.processor.max_pixels)
    asked = ((arguments.query, partial(reader.read, question)) for question in waiting)
    bar = tqdm(
        total=len(questions),
        initial=len(answered),
        unit="page",
        disable=len(questions) == 1 or not sys.stderr.isatty(),
    )
    with closing(log) if log else nullcontext(), closing(reader), bar:
        for number, result in model.generate_each(asked, arguments.batch_size, seed_step=0, **options):
            question = waiting[number]
            record = {**question.record, "query": arguments.query}
            if isinstance(result, UserError):
                if must_succeed:
                    raise result
                failed.append(question.name)
                record["error"] = str(result)
            else:
                record |= describe(result, load_seconds)
                load_seconds = 0.0
                if is_loop(result):
                    looped.append(question.name)
            # before the line, so that a page whose text cannot be written is asked about again
            if texts:
                texts.add(*question.pages, record)
            # before it is shown, so that what was shown is kept
            if log and model.mesh.is_first:
                files = stamp(question.places)
                log.append(record | recorded | ({"file": files, "path": question.places} if files else {}))
            show(question, result, is_only=len(questions) == 1)
            bar.update()
        if log and model.mesh.is_first and len(questions) > 1:
            log.sort()
    if looped:
        names = "; ".join(looped[:NUM_LISTED]) + ("; ..." if len(looped) > NUM_LISTED else "")
        cli.say(f"{counted(len(looped), 'answer')} ended in a loop: {names}")
    if failed and len(questions) > 1:
        cli.say(f"{len(failed)} of {len(questions)} pages failed")
    return 1 if failed else 0


def show(question: Question, result: Answer | UserError, *, is_only: bool) -> None:
    """Prints an answer, or an error on standard error, with the name of its page if there are several."""
    from tqdm import tqdm

    is_error = isinstance(result, UserError)
    is_named = is_only or (is_error and any(short_name(page.source.name) in str(result) for page in question.pages))
    text = str(result) if is_named else f"{question.name}: {result}"
    tqdm.write(f"error: {text}" if is_error else text, file=sys.stderr if is_error else sys.stdout)


def log_path(arguments: argparse.Namespace) -> Path | None:
    """Returns the file of the JSON lines. A folder of texts has one too, from which an interrupted run goes on."""
    if arguments.output:
        return Path(arguments.output)
    return Path(arguments.output_dir, LOG_NAME) if arguments.output_dir else None


def open_log(
    questions: Sequence[Question], arguments: argparse.Namespace, recorded: dict, *, is_writer: bool
) -> AnswerLog | None:
    path = log_path(arguments)
    if not path:
        return None
    keys = [question.key for question in questions]
    return AnswerLog(path, {"query": arguments.query, **recorded}, keys, is_writer=is_writer)


def open_texts(questions: Sequence[Question], arguments: argparse.Namespace) -> TextFiles | None:
    if not arguments.output_dir:
        return None
    pages = [page for question in questions for page in question.pages]
    return TextFiles(Path(arguments.output_dir), arguments.text_format, pages)


def settings_of(model: Any, arguments: argparse.Namespace, options: dict) -> dict[str, Any]:
    """Returns what each JSON line records of the run besides the query: the model and settings that differ."""
    generation, default = model.generation_config(options), GenerationConfig()
    changed = {key: value for key, value in dataclasses.asdict(generation).items() if value != getattr(default, key)}
    if generation.do_sample:
        changed["seed"] = model.seed(generation)
    if arguments.dpi != DEFAULT_DPI:
        changed["dpi"] = arguments.dpi
    if model.config.adapter:
        changed["adapter"] = str(model.config.adapter)
    return {"model": identity(model.config, get_family(model.config.family)), "settings": changed}


def is_loop(answer: Answer) -> bool:
    """Whether an answer ended in a loop, also one that ended for its length first."""
    if answer.stop_reason in ("max_new_tokens", "context_full"):
        return num_repeated_tokens(answer.ids) >= NUM_TOKENS_OF_LOOP
    return answer.stop_reason == "repetition"


def describe(answer: Answer, load_seconds: float) -> dict:
    """Returns the fields of a JSON line; the first page includes the time of loading."""
    return {
        "text": str(answer),
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "seconds": {stage: round(t, 4) for stage, t in {"load": load_seconds, **answer.seconds}.items()},
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "stop_reason": answer.stop_reason,
        "time": round(time.time(), 3),
    }
