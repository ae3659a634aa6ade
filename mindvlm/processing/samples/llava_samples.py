"""Training samples of the LLaVA programs: one id per picture, labels by `label_rules`.

This reproduces runs of the original programs, with two faults that `build_sample` does not have: control tokens in the
text of a record are armed, and a record whose counts differ is not learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER, with_image_marks
from mindvlm.processing.samples.chat_samples import TrainingSample, read_record
from mindvlm.processing.samples.label_rules import IGNORED_LABEL, message_labels, round_labels
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render
from mindvlm.processing.text.tokenizer import Tokenizer

SECTION_MARK = "### "


def image_to_front(text: str, marks: tuple[str, str] = ("", "")) -> str:
    """Replaces all markers of a message by one at its front; returns text without markers unchanged.

    Args:
        marks: text before and after the marker.
    """
    if IMAGE_MARKER not in text:
        return text
    return with_image_marks((IMAGE_MARKER + "\n" + text.replace(IMAGE_MARKER, "").strip()).strip(), marks)


def with_images_in_front(record: Any, marks: tuple[str, str] = ("", "")) -> Any:
    """Returns a training record whose only image of a question is at its front; see `image_to_front`.

    A record without images, or without turns, is unchanged.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list) or not record.get("image"):
        return record
    return {**record, "conversations": [_shown_images(turn, marks) for turn in record["conversations"]]}


def _shown_images(turn: Any, marks: tuple[str, str]) -> Any:
    if not isinstance(turn, dict) or turn.get("from") != "human" or "value" not in turn:
        return turn
    text = str(turn["value"])
    shown = image_to_front(text, marks) if text.count(IMAGE_MARKER) == 1 else with_image_marks(text, marks)
    return {**turn, "value": shown}


def llava_sample(
    record: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    image_marks: tuple[str, str] = ("", ""),
) -> TrainingSample:
    """Returns the ids and labels of a record. A picture is one id, the tokenizer's `<image>`, see `expand_images`.

    Args:
        tokenizer: has a placeholder `<image>`.
        max_length: limit of samples without picture; samples with a picture are cut by the collator.
        image_marks: see `image_to_front`.

    Raises:
        UserError: the record is malformed, or is not one picture with one answer (template "plain").
    """
    has_image = bool(record.get("image"))
    armed = set(tokenizer.special_ids) - (set() if has_image else {IMAGE_MARKER})

    def encode(text: str) -> list[int]:
        return tokenizer.prefix_ids + tokenizer.encode(text, allow_special=armed)

    rule = template.label_rule
    # the rules by message accept any order of speakers
    speakers, turns, images = read_record(record, alternating=rule is None or rule.kind == "rounds")
    if has_image:
        turns = [image_to_front(turn, image_marks) for turn in turns]
    if rule and rule.kind == "picture":
        return _plain_sample(turns, images, template, encode)
    if rule and rule.kind == "messages":
        header = template.system + "\n\n"
        names = dict(zip(("human", "gpt"), template.roles, strict=True))
        parts = [f"{SECTION_MARK}{names[speaker]}: {turn}\n" for speaker, turn in zip(speakers, turns, strict=True)]
        ids = _array(encode(header + "".join(parts) + SECTION_MARK), max_length, has_image)
        pieces = [_array(encode(part), max_length, has_image) for part in [header, *parts]]
        # without a picture, the program does not count tokens with the id of padding
        lengths = [len(piece) if has_image else int((piece != tokenizer.pad_id).sum()) for piece in pieces]
        labels = message_labels(ids, lengths, [speaker == "human" for speaker in speakers])
        return TrainingSample(ids, labels, images, "")
    prompt = prompt_text(render(replace(template, examples=()), turns, empty_leaves_open=True))
    # the rule with a counted closing mark does not cut
    ids = _array(encode(prompt), max_length, has_image or (rule and rule.closing == "counted"))
    labels, warning = round_labels(
        prompt,
        ids,
        template=template,
        count=lambda text: len(encode(text)),
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        continues_text=tokenizer.continues_text,
    )
    return TrainingSample(ids, labels, images, warning)


def _plain_sample(
    turns: list[str], images: tuple[str, ...], template: ChatTemplate, encode: Callable[[str], list[int]]
) -> TrainingSample:
    if len(turns) != 2 or IMAGE_MARKER not in turns[0]:
        raise UserError(
            f"training record: {counted(len(turns), 'turn')}; template {template.name!r} needs a picture and one answer"
        )
    ids = np.array(encode(IMAGE_MARKER + turns[1] + template.separator), dtype=np.int32)
    labels = ids.copy()
    labels[: len(encode(IMAGE_MARKER))] = IGNORED_LABEL
    return TrainingSample(ids, labels, images, "")


def expand_images(
    sample: TrainingSample, *, placeholder_id: int, num_tokens: int, lengths: Sequence[int] | None = None
) -> TrainingSample:
    """Repeats every placeholder of a sample `num_tokens` times, or by the `lengths` of its images in order.

    A placeholder beyond the images remains one.
    """
    is_image = sample.input_ids == placeholder_id
    repeats = np.where(is_image, num_tokens if lengths is None else 1, 1)
    if lengths is not None:
        places = np.flatnonzero(is_image)[: len(lengths)]
        repeats[places] = lengths[: len(places)]
    ids = np.repeat(sample.input_ids, repeats)
    return replace(sample, input_ids=ids, labels=np.repeat(sample.labels, repeats))


def _array(ids: list[int], max_length: int, whole: bool) -> np.ndarray:
    return np.array(ids if whole else ids[:max_length], dtype=np.int32)
