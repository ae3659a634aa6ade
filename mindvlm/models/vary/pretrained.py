"""Adapts pretrained tensors to the model when a training starts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindvlm.nn.positions import NUM_OFFSET_ROWS
from mindvlm.nn.resize_tables import interpolate_positions, keep_shape, resize_embeddings

POSITIONS = "language_model.embed_positions.weight"
TOKENS = "language_model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
# <img> and </img>, the last two tokens of Vary-tiny, start as the mean of the other rows
NUM_MEAN_TOKENS = 2


def fit_pretrained(
    name: str,
    array: np.ndarray,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    description: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Returns a tensor of OPT-125M, Qwen-1.8B or another Vary adapted to the shape of the model.

    Both models follow the original programs:

    - Vary-tiny, whose head is tied, interpolates the position table (2050 rows become 4098 if the context grows from
      2048 to 4096). The token table is cut or extended to the length of the tokenizer (50272 rows of OPT-125M become
      50268), and `<img>` and `</img>` start as the mean row.
    - Vary-toy cuts or extends the token table and the head. Qwen-1.8B has 151936 rows: 151851 tokens and padding to a
      multiple of 128. The first 151860 are kept, so the nine tokens from `<ref>` to `<imgpad>` start as unused rows.

    All other tensors must have the shape of the model. Only for the start of a training: the adapted tables are not
    trained.

    Args:
        name: native name of the tensor.
        array: the pretrained tensor.
        shapes: native name -> shape of all tensors of the model.
        seed: seed of new rows.
        description: unused.

    Raises:
        UserError: the tensor cannot be adapted to the shape.
    """
    shape = tuple(shapes[name])
    if array.shape == shape:
        return array
    if array.shape[1:] == shape[1:]:
        if name == POSITIONS:
            return interpolate_positions(array, shape[0] - NUM_OFFSET_ROWS)
        if name == TOKENS and HEAD not in shapes:
            return resize_embeddings(array, shape[0], num_mean_rows=NUM_MEAN_TOKENS, seed=seed)
        if name in (TOKENS, HEAD):
            # the new rows of the two tables differ
            return resize_embeddings(array, shape[0], seed=2 * seed + (name == HEAD))
    return keep_shape(name, array, shapes)
