"""Samples that are too long end with an answer, and no picture is ever cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL, TrainingSample

LongAnswers = Literal["cut", "skip"]
WHOLE = 1 << 30


def fit_sample(
    conversation: dict[str, Any],
    make_sample: Callable[..., TrainingSample],
    *,
    max_length: int,
    count_images: Callable[[np.ndarray], int],
    long_answers: LongAnswers = "cut",
) -> TrainingSample:
    """The sample of the longest run of whole turns that fits into `max_length` tokens, with the pictures in it.

    Args:
        conversation: of `read_conversation`.
        make_sample: `training_sample` of a processor.
        count_images: pictures that begin within ids.
        long_answers: what happens if not even the first answer fits: "cut" keeps what fits of it, without the mark
            that closes it (so that nothing teaches to stop in the middle), where the family has no other rule; "skip"
            refuses the sample.

    Raises:
        UserError: nothing of the first answer fits ("skip": not all of it).
    """
    sample = make_sample(conversation, max_length=WHOLE)
    if len(sample.input_ids) <= max_length:
        return sample
    is_learned = sample.labels != IGNORED_LABEL
    ends = np.flatnonzero(is_learned & ~np.append(is_learned[1:], False)) + 1
    fitting = ends[ends <= max_length]
    if len(fitting):
        length = int(fitting[-1])
        ids, labels = sample.input_ids[:length], sample.labels[:length]
        return replace(sample, input_ids=ids, labels=labels, images=sample.images[: count_images(ids)])
    if long_answers == "skip" or int(np.argmax(is_learned)) >= max_length:
        raise UserError(
            f"needs {int(ends[0])} tokens up to the end of its first answer; raise data.max_length of {max_length}"
        )
    turns = conversation["conversations"][:2]
    images = conversation["image"][: str(turns[0]["value"]).count(IMAGE_MARKER)]
    return make_sample({"image": images, "conversations": turns}, max_length=max_length)
