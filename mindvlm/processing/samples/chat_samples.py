"""Training samples: conversion of records to token ids and labels.

A record is `{"image": "page.png", "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value":
"A"}]}`; the key `system` replaces the system message of the template. The labels are the tokens of each answer and of
its closing mark. In a caption template the images replace the question, and a sample that is cut still ends with the
closing mark.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.samples.label_rules import IGNORED_LABEL
from mindvlm.processing.text.chat_template import ChatTemplate, render
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.processing.text.tokenizer import Tokenizer

SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class TrainingSample:
    """One sample before padding.

    Attributes:
        input_ids: (length,) int32.
        labels: (length,) int32, IGNORED_LABEL for tokens without label; not shifted.
        images: image names of the record in the order of their spans.
        warning: one line if the sample has no labels, else "".
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[str, ...]
    warning: str

    @property
    def num_learned(self) -> int:
        """Number of tokens with a label."""
        return int((self.labels != IGNORED_LABEL).sum())


def build_sample(
    record: dict[str, Any] | list[dict[str, Any]],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    image_span: ImageSpan,
    max_length: int,
    image_in_front: bool = False,
    image_lengths: Sequence[int] | None = None,
) -> TrainingSample:
    """Returns the ids and labels of one record, cut to `max_length`. Control tokens in its text are disarmed.

    Args:
        image_in_front: see `with_image_in_front`.
        image_lengths: number of placeholders of each image; None for those of the span.

    Raises:
        UserError: the record is malformed, the numbers of images and `<image>` markers differ, an image span exceeds
            `max_length`, or a record for a caption template has no image or more than one answer.
    """
    _, turns, images = read_record(record)
    template = training_template(template)
    if isinstance(record, dict) and record.get("system"):
        template = replace(template, system=str(record["system"]))
    is_caption = template.style == "caption"
    if is_caption:
        if not images or len(turns) != 2:
            raise UserError(
                f"training record: {counted(len(images), 'image')} and {counted(len(turns), 'turn')}; a caption "
                "template needs pictures and one answer"
            )
        turns = [IMAGE_MARKER * len(images), turns[1]]
    num_markers = sum(question.count(IMAGE_MARKER) for question in turns[::2]) if images else 0
    if num_markers != len(images):
        markers = counted(num_markers, f"{IMAGE_MARKER} marker")
        raise UserError(f"training record: {counted(len(images), 'image')}, but {markers} in questions")
    messages: list[str | list[Piece]] = list(turns)
    if images:
        lengths = None if image_lengths is None else iter(image_lengths)
        messages[::2] = [image_span.expand(question, lengths) for question in turns[::2]]
    if image_in_front:
        messages[0] = with_image_in_front(turns[0], template, image_span)
    pieces = render(template, messages)

    prefix_ids = tokenizer.prefix_ids
    text_ids, owners = encode_pieces(pieces, tokenizer)
    needed = image_span.needed_length(prefix_ids + text_ids, tokenizer) if images else 0
    if needed > max_length:
        raise UserError(
            f"max_length {max_length} cuts an image of the sample, which needs {needed} tokens; raise max_length"
        )
    ids = np.array((prefix_ids + text_ids)[:max_length], dtype=np.int32)
    learned = [False] * len(prefix_ids) + [pieces[owner].learned for owner in owners]
    is_learned = np.array(learned[:max_length], dtype=bool)
    if is_caption and is_learned[-1] and template.answer_separator in tokenizer.special_ids:
        ids[-1] = tokenizer.special_id(template.answer_separator)
    labels = np.where(is_learned, ids, np.int32(IGNORED_LABEL))
    warning = "" if is_learned.any() else f"no answer within the first {max_length} tokens: the sample is not learned"
    return TrainingSample(ids, labels, images, warning)


def training_template(template: ChatTemplate) -> ChatTemplate:
    """Returns the template for training: without examples, and with the style "caption" for "plain"."""
    return replace(template, examples=(), style="caption" if template.style == "plain" else template.style)


def with_image_in_front(question: str, template: ChatTemplate, image_span: ImageSpan) -> list[Piece]:
    """Moves the image of a question to its front, followed by a closing mark and a second user header.

    This is the option `sep_image_conv_front` of the original programs.

    Raises:
        UserError: the question has no `<image>` marker.
    """
    if IMAGE_MARKER not in question:
        raise UserError(f"image_in_front: the first question has no {IMAGE_MARKER} marker; add it or switch this off")
    rest = ": " + question.replace(IMAGE_MARKER, "").strip()
    return [
        *image_span.expand(IMAGE_MARKER),
        Piece(template.separator + template.roles[0], control=True),
        Piece(rest),
    ]


def read_record(
    record: dict[str, Any] | list[dict[str, Any]], *, alternating: bool = True
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Returns the speakers, messages and image names of a record. A leading answer is dropped.

    Args:
        alternating: whether speakers must alternate, the user first.

    Raises:
        UserError: the record has no valid turns, or turns that do not alternate.
    """
    if isinstance(record, dict):
        entries, image = record.get("conversations"), record.get("image", ())
    else:
        entries, image = record, ()
    images = (image,) if isinstance(image, str) else tuple(image)
    if not isinstance(entries, list) or not entries:
        raise UserError("training record: expected a non-empty list 'conversations' of {'from', 'value'} turns")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or "value" not in entry or entry.get("from") not in SPEAKERS:
            raise UserError(f"training record, turn {position}: expected {{'from': 'human' or 'gpt', 'value': text}}")
    if alternating and entries[0]["from"] != SPEAKERS[0]:
        entries = entries[1:]
    for position, entry in enumerate(entries):
        if alternating and entry["from"] != SPEAKERS[position % 2]:
            raise UserError(
                f"training record, turn {position}: spoken by {entry['from']!r}, expected {SPEAKERS[position % 2]!r}; "
                "turns must alternate"
            )
    if not entries:
        raise UserError("training record: no turn of 'human'; add a question")
    return [entry["from"] for entry in entries], [str(entry["value"]) for entry in entries], images
