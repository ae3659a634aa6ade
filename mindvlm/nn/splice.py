"""Where the image features go: the host-built index that the model gathers by."""

import numpy as np

from mindvlm.core.errors import UserError, counted


def splice_sources(
    input_ids: np.ndarray,
    num_images: int,
    image_token_len: int,
    pad_id: int,
    *,
    max_length: int | None = None,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of [token embeddings; image features] that make up the merged embeddings.

    The k-th run of placeholders in reading order over the whole batch takes the k-th image, at any position, any
    number of images a row, rows without images in between.

    Args:
        input_ids: (B, L) int.
        num_images: images encoded for this batch.
        image_token_len: feature rows per image.
        pad_id: id of the placeholder token.
        max_length: the merged rows are cut to this length, within an image, too; `input_ids[:, :max_length]` then go
            with the result.
        order: (R,) int, the feature row for each placeholder, where they do not just follow each other; -1 is the row
            behind the last one.

    Returns:
        (B, L) int32, L at most `max_length`.

    Raises:
        UserError: placeholders and feature rows differ in number.
    """
    flat = input_ids.reshape(-1)
    placeholders = np.flatnonzero(flat == pad_id)
    num_features = num_images * image_token_len
    order = np.arange(num_features) if order is None else np.where(order < 0, num_features, order)
    expected = len(order)
    if len(placeholders) != expected:
        raise UserError(
            f"the prompt has {len(placeholders)} image placeholders but the images give {expected} feature rows "
            f"({counted(num_images, 'image')} of {image_token_len}); give one <image> for each picture"
        )
    length = min(input_ids.shape[1], max_length or input_ids.shape[1])
    num_rows = len(input_ids) * length
    sources = np.zeros(flat.size, np.int32)
    sources[placeholders] = num_rows + order
    sources = sources.reshape(input_ids.shape)[:, :length]
    own = np.arange(num_rows, dtype=np.int32).reshape(sources.shape)
    return np.where(input_ids[:, :length] == pad_id, sources, own)
