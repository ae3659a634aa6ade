"""Pre-trained tensors of another size made to fit Vary-tiny before training."""

import numpy as np

from mindvlm.errors import UserError
from mindvlm.models.common.positions import NUM_OFFSET_ROWS
from mindvlm.models.common.resize_tables import interpolate_positions, resize_embeddings

POSITIONS = "language_model.embed_positions.weight"
TOKENS = "language_model.embed_tokens.weight"
# <img> and </img> are the last two tokens and start as the mean of the others
NUM_MEAN_TOKENS = 2


def fit_pretrained(name: str, array: np.ndarray, shape: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """One tensor of OPT-125M or of a Vary-tiny with another context, for a model that expects `shape`.

    The table of positions is interpolated (2050 rows become 4098 where the context grows from 2048 to 4096). That of
    tokens is cut or extended to the tokenizer's length (50272 rows of OPT-125M become 50268), and `<img>` and `</img>`
    start as the mean row, as in the original program. All others must fit. For weights that start a training; a model
    that answers must have been trained with its own tables.

    Args:
        name: the tensor's native name.
        seed: of the new rows.

    Raises:
        UserError: the shapes cannot be brought together.
    """
    if array.shape == tuple(shape):
        return array
    if name == POSITIONS and array.shape[1:] == tuple(shape[1:]):
        return interpolate_positions(array, shape[0] - NUM_OFFSET_ROWS)
    if name == TOKENS and array.shape[1:] == tuple(shape[1:]):
        return resize_embeddings(array, shape[0], num_mean_rows=NUM_MEAN_TOKENS, seed=seed)
    raise UserError(f"tensor {name} has shape {list(array.shape)}; the model expects {list(shape)}")
