"""Index for the insertion of image features into token embeddings, built on the host. Imports no framework."""

import numpy as np

from mindvlm.core.errors import UserError, counted

PROMPT, ANSWERED = 1, 2
"""Kinds of text in a training batch: before the first answer, and from the first answer on."""


def splice_sources(
    input_ids: np.ndarray, num_images: int, image_token_len: int, pad_id: int, *, max_length: int | None = None
) -> np.ndarray:
    """Returns the rows of [token embeddings; image features] that make up the merged embeddings.

    The k-th placeholder in reading order over the whole batch takes the k-th feature row. A row may contain any number
    of images at any position.

    Args:
        input_ids: (B, L) int.
        num_images: number of images of this batch.
        image_token_len: feature rows per image.
        pad_id: id of the placeholder token.
        max_length: rows are cut to this length, even within an image; for `input_ids[:, :max_length]`.

    Returns:
        (B, L) int32, L at most `max_length`.

    Raises:
        UserError: the numbers of placeholders and feature rows differ.
    """
    flat = input_ids.reshape(-1)
    placeholders = np.flatnonzero(flat == pad_id)
    num_features = num_images * image_token_len
    if len(placeholders) != num_features:
        raise UserError(
            f"the prompt has {len(placeholders)} image placeholders but the images give {num_features} feature rows "
            f"({counted(num_images, 'image')} of {image_token_len}); give one <image> for each picture"
        )
    length = min(input_ids.shape[1], max_length or input_ids.shape[1])
    num_rows = len(input_ids) * length
    sources = np.zeros(flat.size, np.int32)
    sources[placeholders] = num_rows + np.arange(num_features)
    sources = sources.reshape(input_ids.shape)[:, :length]
    own = np.arange(num_rows, dtype=np.int32).reshape(sources.shape)
    return np.where(input_ids[:, :length] == pad_id, sources, own)
