"""Training samples as the LLaVA programs make them: text armed, one id for a picture, labels by `label_rules`.

What stands in a record is trusted here, and a record whose counts do not agree is lost; `build_sample` of
conversation.py is without these faults. This is what the original programs' runs are reproduced with.
"""

from collections.abc import Callable
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
    """A message with its picture first, however many markers it has; text without one stays as it is.

    Args:
        marks: text before and behind the marker.
    """
    if IMAGE_MARKER not in text:
        return text
    return with_image_marks((IMAGE_MARKER + "\n" + text.replace(IMAGE_MARKER, "").strip()).strip(), marks)


def llava_sample(
    record: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    image_marks: tuple[str, str] = ("", ""),
) -> TrainingSample:
    """Ids and labels of a record; a picture is one id, that of the tokenizer's `<image>`, see `expand_images`.

    Args:
        tokenizer: has a placeholder `<image>`.
        max_length: text alone is cut there; samples with a picture are cut when they are collated.
        image_marks: see `image_to_front`.

    Raises:
        UserError: the record is malformed, or (template "plain") no picture with one answer.
    """
    has_image = bool(record.get("image"))
    armed = set(tokenizer.special_ids) - (set() if has_image else {IMAGE_MARKER})

    def encode(text: str) -> list[int]:
        return tokenizer.prefix_ids + tokenizer.encode(text, allow_special=armed)

    rule = template.label_rule
    # only the rule for turns asks that speakers alternate
    speakers, turns, images = read_record(record, alternating=rule not in ("default", "plain"))
    if has_image:
        turns = [image_to_front(turn, image_marks) for turn in turns]
    if rule == "plain":
        return _plain_sample(turns, images, template, encode)
    if rule == "default":
        header = template.system + "\n\n"
        names = dict(zip(("human", "gpt"), template.roles, strict=True))
        parts = [f"{SECTION_MARK}{names[speaker]}: {turn}\n" for speaker, turn in zip(speakers, turns, strict=True)]
        ids = _array(encode(header + "".join(parts) + SECTION_MARK), max_length, has_image)
        pieces = [_array(encode(part), max_length, has_image) for part in [header, *parts]]
        # of text alone, what has the id of padding is not counted
        lengths = [len(piece) if has_image else int((piece != tokenizer.pad_id).sum()) for piece in pieces]
        labels = message_labels(ids, lengths, [speaker == "human" for speaker in speakers])
        return TrainingSample(ids, labels, images, "")
    prompt = prompt_text(render(replace(template, examples=()), turns, empty_leaves_open=True))
    # the rule for equal marks knows no cutting
    ids = _array(encode(prompt), max_length, has_image or rule == "mpt")
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
            f"training record: {counted(len(turns), 'turn')}; template {template.name!r} learns one answer to a picture"
        )
    ids = np.array(encode(IMAGE_MARKER + turns[1] + template.separator), dtype=np.int32)
    labels = ids.copy()
    labels[: len(encode(IMAGE_MARKER))] = IGNORED_LABEL
    return TrainingSample(ids, labels, images, "")


def expand_images(sample: TrainingSample, *, placeholder_id: int, num_tokens: int) -> TrainingSample:
    """The sample with `num_tokens` placeholders for every one that it has."""
    repeats = np.where(sample.input_ids == placeholder_id, num_tokens, 1)
    ids = np.repeat(sample.input_ids, repeats)
    return replace(sample, input_ids=ids, labels=np.repeat(sample.labels, repeats))


def _array(ids: list[int], max_length: int, whole: bool) -> np.ndarray:
    return np.array(ids if whole else ids[:max_length], dtype=np.int32)
