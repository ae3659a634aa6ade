"""Matches the pictures of a record with their marks in its questions."""

import re
from typing import Any

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.samples.chat_samples import SPEAKERS
from mindvlm.processing.samples.llava_samples import image_to_front
from mindvlm.processing.samples.record_formats import Record, RecordFormat

# `<Image>`, `<image-placeholder>`, `<image_1>`, `<image/>`, `<img></img>`, `[IMG]`,
# `<|vision_start|><|image_pad|><|vision_end|>` ...
_TAG = r"<\|?\s*(?:image|img|picture)[-_ ]?(?:placeholder|pad|here|token)?[-_ ]?(\d*)\s*[/|]?>"
_START = r"(?:<\|?(?:vision|image|img|im)_start\|?>\s*)?"
_END = r"(?:\s*(?:<\|?(?:vision|image|img|im)_end\|?>|</(?:image|img|picture)>))?"
_MARK = rf"(?:{_START}{_TAG}{_END}|\[(?:image|img)\])"
MARKS = re.compile(_MARK, re.IGNORECASE)
"""`<image>` and its other spellings."""

_ENCLOSED = re.compile(rf"{_START}{IMAGE_MARKER}{_END}", re.IGNORECASE)
_OF_LOST_PICTURE = re.compile(rf"^\s*{_MARK}\s*(?:\n|$)|<img>[^<\n]+</img>", re.IGNORECASE)
ALONE_MARKS = re.compile(rf"{_OF_LOST_PICTURE.pattern}|\n\s*{_MARK}\s*$", re.IGNORECASE)
"""Marks that are the first or last line. Elsewhere a mark without a picture is text, as in a question about HTML."""


def read_conversation(record: Any, format: RecordFormat, *, images_in_front: bool = False) -> dict[str, Any]:
    """Returns a record as `{"image": [names], "conversations": [turns]}`, the form of training samples.

    A leading answer is dropped, and a `system` message is kept under that key. Other spellings of `<image>` count if
    the record has pictures and no `<image>`. The only picture keeps the first of its marks in several questions.

    Args:
        images_in_front: puts images without a marker before the first question, as caption templates do.

    Raises:
        UserError: see `RecordFormat.read`; turns do not alternate, there is no answer, or the numbers of images and of
            `<image>` markers in the questions differ.
    """
    read = format.read(record)
    images, turns = read.images, alternating(read)
    questions = [str(turn["value"]) for turn in turns[::2]]
    if images:
        questions = with_marks(questions, len(images), collapses=format.follows_llava)
    num_markers = sum(question.count(IMAGE_MARKER) for question in questions)
    if not images and not format.follows_llava and any(map(_OF_LOST_PICTURE.search, questions)):
        raise UserError(
            f"{counted(len(images), 'picture')} for {counted(max(1, num_markers), f'{IMAGE_MARKER} marker')} in the "
            "questions; name a picture for each"
        )
    if images and not num_markers:
        if images_in_front or format.answer:
            joint = "" if images_in_front else "\n"
            questions[0] = (IMAGE_MARKER + joint) * len(images) + questions[0]
            num_markers = len(images)
        elif format.follows_llava and len(images) == 1:
            images = []
    if images and num_markers != len(images):
        remedy = "name a picture for each" if num_markers > len(images) else f"mark its place with {IMAGE_MARKER}"
        markers = counted(num_markers, f"{IMAGE_MARKER} marker")
        raise UserError(f"{counted(len(images), 'picture')} for {markers} in the questions; {remedy}")
    if read.images:
        turns = [turn if i % 2 else {**turn, "value": questions[i // 2]} for i, turn in enumerate(turns)]
    system = {"system": read.system} if read.system else {}
    return {"image": images, "conversations": turns, **system}


def alternating(record: Record) -> list[dict[str, Any]]:
    """Returns the turns from the first question on. Raises UserError if they do not alternate or have no answer."""
    turns = record.turns
    first = 0 if turns and turns[0].speaker == SPEAKERS[0] else 1
    for number, turn in enumerate(turns[first:]):
        if turn.speaker != SPEAKERS[number % 2]:
            speakers = f"spoken by {turn.speaker!r}, expected {SPEAKERS[number % 2]!r}"
            raise UserError(f"turn {number + first}: {speakers}; turns must alternate")
    if len(turns) - first < 2:
        raise UserError("no answer of 'gpt' to a question of 'human' in it; nothing to learn")
    return [{"from": turn.speaker, "value": turn.text} for turn in turns[first:]]


def with_marks(questions: list[str], num_images: int, *, collapses: bool) -> list[str]:
    """Returns the questions of a record with pictures, their marks spelled `<image>`.

    Args:
        collapses: the only picture moves to the front of a question that marks it several times.

    Raises:
        UserError: numbered marks are not in the order of the pictures.
    """
    if not any(IMAGE_MARKER in question for question in questions):
        numbers = [int(number) for number in MARKS.findall("\n".join(questions)) if number]
        if numbers != sorted(numbers):
            raise UserError(f"numbered image marks are in the order {numbers}; name the pictures in that order")
        questions = [MARKS.sub(IMAGE_MARKER, question) for question in questions]
    questions = [_ENCLOSED.sub(IMAGE_MARKER, question) for question in questions]
    if num_images > 1:
        return questions
    shown: list[str] = []
    for question in questions:
        if any(IMAGE_MARKER in earlier for earlier in shown):
            question = question.replace(IMAGE_MARKER, "").strip()
        shown.append(image_to_front(question) if collapses and question.count(IMAGE_MARKER) > 1 else question)
    return shown
