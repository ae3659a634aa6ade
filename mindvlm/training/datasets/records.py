"""Converts the annotation formats to one form: alternating turns of human and gpt, and the images they show."""

from typing import Any

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.samples.chat_samples import SPEAKERS
from mindvlm.processing.samples.llava_samples import image_to_front

LINE_BREAK_MARK = "<lb>"


def read_conversation(record: Any, format: str, *, images_in_front: bool = False) -> dict[str, Any]:
    """Returns a record as `{"image": [names], "conversations": [turns]}`, the form of training samples.

    "vary": unchanged; a bare list is a conversation without images, and a leading turn of gpt is dropped.
    "llava": the same; if a question has several markers of the only image, the image comes once, in front; an image
    without a marker is dropped.
    "vary_tiny_600k": image and question form the question, the caption is the answer; `<lb>` becomes a newline.

    Args:
        images_in_front: puts images without a marker before the first question, as caption templates do.

    Raises:
        UserError: a key is missing or has another type, turns do not alternate, there is no answer, or the numbers of
            images and `<image>` markers in the questions differ.
    """
    if format == "vary_tiny_600k":
        images, turns = _caption(record)
    else:
        images, turns = _conversation(record)
    if format == "llava" and len(images) == 1:
        images, turns = _one_picture(images, turns)
    is_marked = any(IMAGE_MARKER in str(turn["value"]) for turn in turns[::2])
    if images_in_front and not is_marked:
        turns = [{**turns[0], "value": IMAGE_MARKER * len(images) + str(turns[0]["value"])}, *turns[1:]]
    num_markers = sum(str(turn["value"]).count(IMAGE_MARKER) for turn in turns[::2])
    if num_markers != len(images):
        remedy = "name a picture for each" if num_markers > len(images) else f"mark its place with {IMAGE_MARKER}"
        markers = counted(num_markers, f"{IMAGE_MARKER} marker")
        raise UserError(f"{counted(len(images), 'picture')} for {markers} in the questions; {remedy}")
    return {"image": images, "conversations": turns}


def _one_picture(images: list[str], turns: list[dict]) -> tuple[list[str], list[dict]]:
    counts = [str(turn["value"]).count(IMAGE_MARKER) for turn in turns[::2]]
    if not any(counts):
        return [], turns
    if max(counts) == 1:
        return images, turns
    questions = [{**turn, "value": image_to_front(str(turn["value"]))} for turn in turns[::2]]
    return images, [questions[i // 2] if i % 2 == 0 else turn for i, turn in enumerate(turns)]


def _caption(record: Any) -> tuple[list[str], list[dict]]:
    if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
        raise UserError(
            "expected {'image': name, 'question': text, 'caption': text}; is the format of the registry right?"
        )
    images = _image_names(record.get("image"))
    question = str(record.get("question") or "")
    markers = "" if IMAGE_MARKER in question else (IMAGE_MARKER + "\n") * len(images)
    answer = record["caption"].replace(LINE_BREAK_MARK, "\n")
    return images, [
        {"from": SPEAKERS[0], "value": markers + question},
        {"from": SPEAKERS[1], "value": answer},
    ]


def _conversation(record: Any) -> tuple[list[str], list[dict]]:
    record = {"conversations": record} if isinstance(record, list) else record
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError("expected {'image': name, 'conversations': [{'from', 'value'}, ...]} with at least one turn")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS or _is_no_text(turn.get("value")):
            raise UserError(
                f"turn {number}: expected {{'from': 'human' or 'gpt', 'value': text}}, found {_short(turn)}"
            )
    first = 0 if turns[0]["from"] == SPEAKERS[0] else 1
    for number, turn in enumerate(turns[first:]):
        if turn["from"] != SPEAKERS[number % 2]:
            speakers = f"spoken by {turn['from']!r}, expected {SPEAKERS[number % 2]!r}"
            raise UserError(f"turn {number + first}: {speakers}; turns must alternate")
    if len(turns) - first < 2:
        raise UserError("no answer of 'gpt' to a question of 'human' in it; nothing to learn")
    return _image_names(record.get("image")), turns[first:]


def _image_names(value: Any) -> list[str]:
    names = [] if value is None or value == "" else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"'image' is {_short(value)}; expected the name of a picture, or a list of names")
    return names


def _is_no_text(value: Any) -> bool:
    return not isinstance(value, str | int | float) or isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
