"""Pre-trained tensors of another size made to fit a Vary before training."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.nn.positions import NUM_OFFSET_ROWS
from mindvlm.nn.resize_tables import interpolate_positions, resize_embeddings

POSITIONS = "language_model.embed_positions.weight"
TOKENS = "language_model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
# <img> and </img> are the last two tokens of Vary-tiny and start as the mean of the others
NUM_MEAN_TOKENS = 2


def fit_pretrained(
    name: str,
    array: np.ndarray,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    description: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """One tensor of OPT-125M, of Qwen-1.8B or of a Vary with another context, for a model with tensors of `shapes`.

    Vary-tiny, whose head is its table of tokens: the table of positions is interpolated (2050 rows become 4098 where
    the context grows from 2048 to 4096). That of tokens is cut or extended to the tokenizer's length (50272 rows of
    OPT-125M become 50268), and `<img>` and `</img>` start as the mean row.

    Vary-toy: the table of tokens and the head are cut or extended. Of the 151936 rows of Qwen-1.8B 151851 are tokens
    and the others fill up to a multiple of 128; the first 151860 are kept, so that the nine tokens of Vary-toy from
    `<ref>` to `<imgpad>` start as rows that Qwen never used.

    Both as in the original programs. All other tensors must fit. For weights that start a training; a model that
    answers must have been trained with its own tables.

    Args:
        name: the tensor's native name.
        shapes: of all tensors of the model by native name.
        seed: of the new rows.
        description: the config.json beside the checkpoint, which nothing depends on here.

    Raises:
        UserError: the shapes cannot be brought together.
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
    raise UserError(f"tensor {name} has shape {list(array.shape)}; the model expects {list(shape)}")
