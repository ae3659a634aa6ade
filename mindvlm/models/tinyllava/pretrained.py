"""Pre-trained tensors of another size made to fit before training."""

from collections.abc import Mapping

import numpy as np

from mindvlm.errors import UserError
from mindvlm.models.common.resize_tables import resize_embeddings

ROW_TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")


def fit_pretrained(name: str, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> np.ndarray:
    """One tensor of a pre-trained model, for a model with tensors of `shapes`.

    Tables with a row for each token are cut to the tokenizer's length, or extended by rows that are the mean of those
    before them (`<im_start>` and `<im_end>` in the original program). All others must fit.

    Args:
        name: the tensor's native name.
        seed: of new rows; there are none that are drawn.

    Raises:
        UserError: the shapes cannot be brought together.
    """
    shape = shapes[name]
    if array.shape == tuple(shape):
        return array
    if name in ROW_TABLES and array.shape[1:] == tuple(shape[1:]):
        num_new = max(0, shape[0] - array.shape[0])
        return resize_embeddings(array, shape[0], num_mean_rows=num_new, seed=seed)
    raise UserError(f"tensor {name} has shape {list(array.shape)}; the model expects {list(shape)}")
