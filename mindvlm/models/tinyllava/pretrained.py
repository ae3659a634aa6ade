"""Pre-trained tensors made into those that a training starts with."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.processing import IMAGE_END, IMAGE_START, new_image_marks
from mindvlm.nn.resize_tables import resize_embeddings

ROW_TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")


def make_fit(config: TinyLlavaConfig) -> Callable[..., np.ndarray]:
    """`fit_pretrained` for the tokens of a run. Raises UserError if the tokenizer cannot be read."""
    return functools.partial(fit_pretrained, new_ids=new_image_marks(config.processor))


def fit_pretrained(
    name: str,
    array: np.ndarray,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    new_ids: Sequence[int] = (),
    description: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """One tensor of a pre-trained model, for a model with tensors of `shapes`.

    Tables with a row for each token are cut, or extended by rows that are the mean of those before them. The rows of
    `<im_start>` and `<im_end>`, where they are new to the checkpoint, become the mean of all before them, as in the
    original program, though the table may have such rows: a published one is filled up with rows that no token has.
    All other tensors must fit.

    Args:
        name: the tensor's native name.
        seed: of new rows; there are none that are drawn.
        new_ids: of the two tokens, where the tokenizer's files lack them.
        description: the config.json beside the checkpoint; it says whether that was trained with them all the same.

    Raises:
        UserError: the shapes cannot be brought together.
    """
    shape = tuple(shapes[name])
    if name in ROW_TABLES and array.shape[1:] == shape[1:]:
        starts_anew = bool(new_ids) and not knows_marks(len(array), min(new_ids, default=0), description)
        if array.shape == shape and not starts_anew:
            return array
        table = resize_embeddings(array, shape[0], num_mean_rows=max(0, shape[0] - len(array)), seed=seed)
        if starts_anew:
            table[list(new_ids)] = table[: min(new_ids)].mean(axis=0, dtype=np.float64)
        return table
    if array.shape == shape:
        return array
    raise UserError(f"tensor {name} has shape {list(array.shape)}; the model expects {list(shape)}")


def knows_marks(num_rows: int, first_id: int, description: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint was trained with `<im_start>` and `<im_end>`, or may have been.

    A table that is filled up looks the same with and without them, so only its config.json tells. Trained rows that are
    lost are worse than unused ones that stay: without a config.json the answer is yes.
    """
    if description is not None:
        return bool(description.get("mm_use_im_start_end"))
    if num_rows <= first_id:
        return False
    warnings.warn(
        f"init.weights: no config.json beside the token embeddings says whether {IMAGE_START} and {IMAGE_END} were "
        "trained, so their rows stay as they are; put that of the language model there for rows that are the mean",
        stacklevel=2,
    )
    return True
