"""Looks at the data before the first step: which records are used, what they lose, and what is learned.

A run with a wrong template, key or format trains without an error and learns nothing, so what would only show in the
answers of the trained model is said, or refused, here.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.sources import encoded_picture
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL, TrainingSample
from mindvlm.processing.samples.record_formats import SPEAKERS
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.training.datasets.records import ALONE_MARKS, MARKS
from mindvlm.training.datasets.samples import SampleMaker, SampleOptions, require_folder

NUM_RECORDS = 200
"""Number of records of each data set to look at, spread evenly over its file."""

MAX_SHOWN = 300


class Problem(NamedTuple):
    """A problem that records have, and its remedy; "" for one that stops no job."""

    what: str
    remedy: str


UNUSABLE = Problem("cannot be used", "correct the data or the registry")
UNLABELLED = Problem("have no label, so nothing is learned from them", "choose the template of the tokenizer")
CUT = Problem("are cut before their answer, so nothing is learned from them", "raise data.max_length")
NO_MARK = Problem("lose their picture: no question marks its place", "mark it with <image>")
NO_PICTURE = Problem("mark a picture but name none, so the mark is text", "name the pictures under the key 'image'")
MARK_IN_TEXT = Problem("have an image mark in a sentence but name no picture, so the mark is text", "")
NO_ROOM = Problem("lose pictures, because their turns do not fit into data.max_length", "")
NO_SYSTEM = Problem("lose their system message: the template does not show it", "")


def inspect_data(options: SampleOptions, processor: ChatProcessor, *, stops: bool) -> list[str]:
    """Returns lines with the share of records that are used and have labels, what others lose, and the first sample.

    Args:
        processor: what `options.make_processor` returns.
        stops: raises for an unfit template or data; otherwise the lines have these, too.

    Raises:
        UserError: the template does not fit the tokenizer, or most of the records of a data set have a problem.
    """
    lines = []

    def refuse(text: str, remedy: str, override: str = ", or train anyway with data.inspection: warn") -> None:
        if stops:
            raise UserError(f"{text}; {remedy}{override}")
        lines.append(text)

    refuse_unfit_template(processor, refuse)
    maker = SampleMaker(replace(options, make_processor=lambda: processor))
    first_sample = None
    for dataset, (entry, index) in enumerate(zip(options.entries, maker.indexes, strict=True)):
        where = f"data set {entry.name!r}"
        numbers = range(0, len(index), -(-len(index) // NUM_RECORDS))
        found: dict[Problem, list[str]] = {UNUSABLE: [], CUT: [], UNLABELLED: []}
        for number in numbers:
            sample, problems = _look_at(maker, dataset, number)
            for problem, reason in problems.items():
                place = f"record {number} (line {index.place(number).line})"
                found.setdefault(problem, []).append(f"{place}: {reason}" if reason else place)
            if sample and not first_sample:
                first_sample = sample
                lines.append(f"first sample, {where}, record {number}: {shown_sample(sample, processor)}")
        num_used = len(numbers) - len(found[UNUSABLE])
        num_labelled = num_used - len(found[CUT]) - len(found[UNLABELLED])
        looked = f"{where}: {len(numbers)} of {len(index)} records looked at"
        lines.append(f"{looked}: {num_used} can be used, {num_labelled} have labels")
        for problem, places in found.items():
            if not places:
                continue
            text = f"{where}: {len(places)} of {len(numbers)} records {problem.what}; the first is {places[0]}"
            if problem is UNUSABLE and 2 * len(places) > len(numbers):
                others = ", or train on the others with data.inspection: warn" if num_used else ""
                refuse(text, problem.remedy, others)
            elif problem.remedy and 2 * len(places) > len(numbers):
                refuse(text, problem.remedy)
            else:
                lines.append(text)
        index.close()
    return lines


def refuse_unfit_template(processor: ChatProcessor, refuse: Callable[[str, str], None]) -> None:
    """Refuses a template whose mark that closes an answer is not one token.

    A mark of ordinary characters, such as `###`, may be several.

    Args:
        refuse: called with the reason and the remedy.
    """
    template, tokenizer = processor.template, processor.tokenizer
    mark = template.answer_separator
    num_tokens = len(encode_pieces([Piece(mark, control=True)], tokenizer)[0])
    if num_tokens == 1 or not re.fullmatch(r"<.+>", mark):
        return
    fitting = [one.name for one in processor.templates.values() if one.answer_separator in tokenizer.special_ids]
    names = ", ".join(fitting[:4])
    refuse(
        f"template {template.name!r} closes an answer with {mark!r}, which is not one token of this tokenizer but "
        f"{num_tokens}, so the model would learn it letter by letter",
        f"set model_changes.processor.template to one that fits{f' ({names})' if names else ''}",
    )


def shown_sample(sample: TrainingSample, processor: ChatProcessor) -> str:
    """Returns the text of a sample in one line, with what is learned between [[ and ]]."""
    placeholder = processor.image_span.placeholder
    kinds = zip(
        sample.input_ids == processor.tokenizer.special_id(placeholder), sample.labels != IGNORED_LABEL, strict=True
    )
    parts, start = [], 0
    for (is_image, is_learned), run in itertools.groupby(kinds):
        end = start + len(list(run))
        text = f"{placeholder}x{end - start}" if is_image else _text(sample.input_ids[start:end], processor)
        parts.append(f"[[{text}]]" if is_learned else text)
        start = end
    return f"{counted(len(sample.input_ids), 'token')}, {sample.num_learned} learned: {''.join(parts)}"


def _text(ids: np.ndarray, processor: ChatProcessor) -> str:
    text = repr(processor.tokenizer.decode_bytes(ids).decode(errors="replace"))[1:-1]
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"


def _look_at(maker: SampleMaker, dataset: int, number: int) -> tuple[TrainingSample | None, dict[Problem, str]]:
    """Returns the sample of a record, None if it cannot be used, and its problems with their reasons."""
    entry, processor = maker.options.entries[dataset], maker.processor
    try:
        record = maker.indexes[dataset].read(number)
        conversation = maker.read(dataset, record)
        # the number of turns that fit depends on the size of the pictures
        pictures = maker.pictures(entry, conversation["image"], number) if processor.lengths_differ else None
        sample = maker.fitted(conversation, pictures)
        require_folder(entry, sample.images)
        for source in sample.images:
            name, file = encoded_picture(source, entry.images or "")
            if isinstance(file, Path) and not file.is_file():
                raise UserError(f"{name}: no such file; check the path and the images folder")
    except (UserError, OSError, UnicodeError) as error:
        return None, {UNUSABLE: str(error)}
    parts = maker.options.formats[dataset].read(record)
    questions = [str(turn.text) for turn in parts.turns if turn.speaker == SPEAKERS[0]]
    marks_alone = not parts.images and any(map(ALONE_MARKS.search, questions))
    has_problem = {
        NO_MARK: parts.images and not conversation["image"],
        NO_PICTURE: marks_alone,
        MARK_IN_TEXT: not parts.images and not marks_alone and any(map(MARKS.search, questions)),
        NO_ROOM: len(sample.images) < len(conversation["image"]),
        NO_SYSTEM: parts.system and not processor.shows_system,
    }
    is_cut = len(sample.input_ids) >= maker.options.max_length
    problems = {CUT if is_cut else UNLABELLED: sample.warning} if sample.num_learned == 0 else {}
    return sample, problems | {problem: "" for problem, holds in has_problem.items() if holds}
