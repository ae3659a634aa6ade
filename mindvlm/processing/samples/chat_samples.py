"""Training samples: a conversation record to token ids and labels, and samples to a batch.

Record format and labels are those of the conversation dataset of the original Vary program:
`{"image": "page.png", "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}]}`.
Learned are the tokens of each answer and the mark that closes it. Under a caption template (Vary-tiny) the question is
replaced by the picture alone, and a sample that is cut still ends with the closing mark.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.samples.label_rules import IGNORED_LABEL, round_labels
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render
from mindvlm.processing.text.pieces import Piece, encode_pieces
from mindvlm.processing.text.tokenizer import Tokenizer

SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class TrainingSample:
    """One sample before padding.

    Attributes:
        input_ids: (length,) int32.
        labels: (length,) int32, IGNORED_LABEL where nothing is learned; not shifted.
        images: image names as the record has them, in the order of their spans.
        warning: one line if nothing of the sample is learned, else "".
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[str, ...]
    warning: str

    @property
    def num_learned(self) -> int:
        """Tokens with a label."""
        return int((self.labels != IGNORED_LABEL).sum())


def build_sample(
    record: dict[str, Any] | list[dict[str, Any]],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    image_span: ImageSpan,
    max_length: int,
    image_in_front: bool = False,
    original_parse: bool = False,
) -> TrainingSample:
    """Ids and labels of one record, cut to `max_length`.

    Args:
        image_in_front: the original's `sep_image_conv_front`: the image moves to the front of the first question and
            gets a separator and a second user header behind it.
        original_parse: do what the original program does: special surface forms in the text are armed, an empty answer
            leaves its turn open, and labels come from splitting the prompt at the separator, which drops the whole
            sample (with its warning) when the counts disagree. By default text is disarmed, such samples are learned.
            A caption without a picture gets an image span all the same.

    Raises:
        UserError: the record is malformed, the number of images differs from the number of `<image>` markers, or (both
            not with `original_parse`) an image span does not fit into `max_length`, or a record for a caption template
            has no picture or more than one answer.
    """
    _, turns, images = read_record(record)
    # the examples of a template are for asking: they are the same in every prompt, there is nothing to learn in them
    template = replace(template, examples=(), style="caption" if template.style == "plain" else template.style)
    is_caption = template.style == "caption"
    if is_caption:
        turns = _caption_turns(turns, images, original_parse)
    if image_in_front:
        turns[0] = _image_to_front(turns[0], template)
    messages = _expand_images(record, turns, images, image_span, original_parse)
    pieces = render(template, messages, empty_leaves_open=original_parse)
    if original_parse:
        prompt = prompt_text(pieces)
        prompt_ids = tokenizer.prefix_ids + tokenizer.encode(prompt, allow_special=True)
        ids = np.array(prompt_ids[:max_length], dtype=np.int32)
        if is_caption:
            return TrainingSample(ids, _original_caption_labels(ids, pieces, tokenizer), images, "")
        labels, warning = round_labels(
            prompt,
            ids,
            template=template,
            count=lambda text: len(tokenizer.encode(text, allow_special=True)),
            pad_id=tokenizer.pad_id,
            max_length=max_length,
        )
        return TrainingSample(ids, labels, images, warning)
    prefix_ids = tokenizer.prefix_ids
    text_ids, owners = encode_pieces(pieces, tokenizer)
    all_ids = prefix_ids + text_ids
    ids = np.array(all_ids[:max_length], dtype=np.int32)
    needed = image_span.needed_length(all_ids, tokenizer) if images else 0
    if needed > max_length:
        raise UserError(
            f"max_length {max_length} cuts an image of the sample, it needs {needed} tokens: raise max_length"
        )
    learned = [False] * len(prefix_ids) + [pieces[owner].learned for owner in owners]
    is_learned = np.array(learned[:max_length], dtype=bool)
    if is_caption and is_learned[-1] and template.answer_separator in tokenizer.special_ids:
        ids[-1] = tokenizer.special_id(template.answer_separator)
    labels = np.where(is_learned, ids, np.int32(IGNORED_LABEL))
    warning = "" if is_learned.any() else f"no answer within the first {max_length} tokens: nothing of it is learned"
    return TrainingSample(ids, labels, images, warning)


def collate(samples: Sequence[TrainingSample], *, pad_id: int, pads_are_text: bool = False) -> dict[str, np.ndarray]:
    """Pads on the right to the longest sample.

    Args:
        pads_are_text: the pad id also stands for something in the samples (TinyLLaVA's end of text).

    Returns:
        `input_ids` (batch, length), `labels` (batch, length) and `attention_mask` (batch, length), all int32. The mask
        is 0 in the fill and, unless `pads_are_text`, at every pad id, as in the original program.
    """
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = np.full((len(samples), length), pad_id, dtype=np.int32)
    labels = np.full((len(samples), length), IGNORED_LABEL, dtype=np.int32)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = sample.input_ids
        labels[row, : len(sample.labels)] = sample.labels
    mask = input_ids != pad_id
    if pads_are_text:
        mask = np.arange(length) < np.array([[len(sample.input_ids)] for sample in samples])
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask.astype(np.int32)}


def read_record(
    record: dict[str, Any] | list[dict[str, Any]], *, alternating: bool = True
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Speakers, messages and image names of a record; a leading answer is left out.

    Args:
        alternating: False takes the turns as they are, whoever speaks.

    Raises:
        UserError: it has no turns of the right form, or turns that do not alternate.
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
        raise UserError("training record: no turn of 'human' in it")
    return [entry["from"] for entry in entries], [str(entry["value"]) for entry in entries], images


def _caption_turns(turns: list[str], images: tuple[str, ...], original_parse: bool) -> list[str]:
    """Questions that are nothing but the picture."""
    if original_parse:
        return [turn if position % 2 else IMAGE_MARKER for position, turn in enumerate(turns)]
    if not images or len(turns) != 2:
        raise UserError(
            f"training record: {counted(len(images), 'image')} and {counted(len(turns), 'turn')}; a caption template "
            "learns one answer to a picture"
        )
    return [IMAGE_MARKER * len(images), turns[1]]


def _original_caption_labels(ids: np.ndarray, pieces: list[Piece], tokenizer: Tokenizer) -> np.ndarray:
    """Labels behind the first picture; the last id becomes the end mark in both arrays."""
    labels = ids.copy()
    first_question = prompt_text([piece for piece in pieces if not piece.learned][:1])
    labels[: len(tokenizer.prefix_ids) + len(tokenizer.encode(first_question, allow_special=True))] = IGNORED_LABEL
    ids[-1] = labels[-1] = tokenizer.special_id(tokenizer.end_token)
    return labels


def _image_to_front(question: str, template: ChatTemplate) -> list[Piece | str]:
    if IMAGE_MARKER not in question:
        raise UserError(f"image_in_front: the first question has no {IMAGE_MARKER} marker: add it or switch this off")
    rest = question.replace(IMAGE_MARKER, "").strip()
    return [IMAGE_MARKER, Piece(template.separator + template.roles[0], control=True), ": " + rest]


def _expand_images(
    record: Any, turns: list[Any], images: tuple[str, ...], image_span: ImageSpan, original_parse: bool
) -> list[list[Piece]]:
    expands = isinstance(record, dict) if original_parse else bool(images)
    messages = []
    num_markers = 0
    for position, turn in enumerate(turns):
        is_expanded = expands and (original_parse or position % 2 == 0)
        message: list[Piece] = []
        for part in turn if isinstance(turn, list) else [turn]:
            if isinstance(part, Piece):
                message.append(part)
                continue
            num_markers += part.count(IMAGE_MARKER) if is_expanded else 0
            message += image_span.expand(part) if is_expanded else [Piece(part)]
        messages.append(message)
    if num_markers != len(images) and not original_parse:
        markers = counted(num_markers, f"{IMAGE_MARKER} marker")
        raise UserError(f"training record: {counted(len(images), 'image')}, but {markers} in questions")
    return messages
