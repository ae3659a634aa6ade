"""Training samples of the original Vary programs, and batches as the original programs make them.

The samples have three faults that `build_sample` avoids: control tokens in a record's text act as control tokens; an
empty answer leaves its turn open; and labels come from splitting the prompt at the closing marks, so that all labels of
a sample with mismatched counts are ignored.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.samples.chat_samples import (
    TrainingSample,
    read_record,
    training_template,
    with_image_in_front,
)
from mindvlm.processing.samples.label_rules import IGNORED_LABEL, round_labels
from mindvlm.processing.text.chat_template import ChatTemplate, prompt_text, render
from mindvlm.processing.text.pieces import Piece
from mindvlm.processing.text.tokenizer import Tokenizer


def original_sample(
    record: dict[str, Any] | list[dict[str, Any]],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    image_span: ImageSpan,
    max_length: int,
    image_in_front: bool = False,
) -> TrainingSample:
    """Returns ids and labels of one record, cut to `max_length`.

    Every caption gets an image span, even without a picture.

    Args:
        image_in_front: see `with_image_in_front`.

    Raises:
        UserError: the record is malformed, or the template has no label rule.
    """
    _, turns, images = read_record(record)
    template = training_template(template)
    is_caption = template.style == "caption"
    if is_caption:
        turns = [turn if position % 2 else IMAGE_MARKER for position, turn in enumerate(turns)]
    messages = [image_span.expand(turn) if isinstance(record, dict) else [Piece(turn)] for turn in turns]
    if image_in_front:
        messages[0] = with_image_in_front(turns[0], template, image_span)
    pieces = render(template, messages, empty_leaves_open=True)
    prompt = prompt_text(pieces)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, allow_special=True))

    ids = np.array((tokenizer.prefix_ids + tokenizer.encode(prompt, allow_special=True))[:max_length], dtype=np.int32)
    if is_caption:
        return TrainingSample(ids, _caption_labels(ids, pieces, tokenizer), images, "")
    labels, warning = round_labels(
        prompt, ids, template=template, count=count, pad_id=tokenizer.pad_id, max_length=max_length
    )
    return TrainingSample(ids, labels, images, warning)


def _caption_labels(ids: np.ndarray, pieces: list[Piece], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the labels after the first picture. Sets the last id and label to the end token."""
    labels = ids.copy()
    first_question = prompt_text([piece for piece in pieces if not piece.learned][:1])
    labels[: len(tokenizer.prefix_ids) + len(tokenizer.encode(first_question, allow_special=True))] = IGNORED_LABEL
    ids[-1] = labels[-1] = tokenizer.special_id(tokenizer.end_token)
    return labels


def collate(samples: Sequence[TrainingSample], *, pad_id: int, pads_are_text: bool = False) -> dict[str, np.ndarray]:
    """Pads samples on the right to the length of the longest one.

    Args:
        pads_are_text: whether the pad id also occurs as a token of the samples, such as the end of text.

    Returns:
        `input_ids` (batch, length), `labels` (batch, length) and `attention_mask` (batch, length), all int32. The mask
        is 0 in the padding and, unless `pads_are_text`, at every pad id, as in the original programs.
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
