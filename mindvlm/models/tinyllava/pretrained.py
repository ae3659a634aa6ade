"""Adapts pretrained tensors to the model when a training starts."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.names import ROW_TABLES
from mindvlm.models.tinyllava.processor import IMAGE_END, IMAGE_START, new_image_marks
from mindvlm.nn.resize_tables import keep_shape, resize_embeddings


def make_fit(config: TinyLlavaConfig) -> Callable[..., np.ndarray]:
    """Returns `fit_pretrained` with the new tokens of a run.

    Raises:
        UserError: the tokenizer cannot be read.
    """
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
    """Returns a pretrained tensor adapted to the shape of the model.

    Tables with one row per token are cut, or extended with the mean of their rows. If `<im_start>` and `<im_end>` are
    new to the checkpoint, their rows become the mean of all rows before them, as in the original program. This also
    replaces existing rows, because published tables are padded with unused rows. All other tensors must have the
    shape of the model.

    Args:
        name: native name of the tensor.
        array: the pretrained tensor.
        shapes: native name -> shape of all tensors of the model.
        seed: unused; no row is random.
        new_ids: ids of the two tokens if the tokenizer's files lack them.
        description: the config.json beside the checkpoint; it says whether the checkpoint was trained with them.

    Raises:
        UserError: the tensor cannot be adapted to the shape.
    """
    shape = tuple(shapes[name])
    if name in ROW_TABLES and array.shape[1:] == shape[1:]:
        starts_anew = bool(new_ids) and not knows_marks(len(array), min(new_ids, default=0), description)
        if array.shape == shape and not starts_anew:
            return array
        # the head's bias has one value per row
        rows = array.reshape(len(array), -1)
        table = resize_embeddings(rows, shape[0], num_mean_rows=max(0, shape[0] - len(rows)), seed=seed).reshape(shape)
        if starts_anew:
            table[list(new_ids)] = table[: min(new_ids)].mean(axis=0, dtype=np.float64)
        return table
    return keep_shape(name, array, shapes)


def knows_marks(num_rows: int, first_id: int, description: Mapping[str, Any] | None) -> bool:
    """Returns whether a checkpoint was, or may have been, trained with `<im_start>` and `<im_end>`.

    A padded table looks the same in both cases, so config.json decides. Without a config.json the result is True,
    because losing trained rows is worse than keeping unused ones.
    """
    if description is not None:
        return bool(description.get("mm_use_im_start_end"))
    if num_rows <= first_id:
        return False
    warnings.warn(
        f"init.weights: no config.json beside the token embeddings says whether {IMAGE_START} and {IMAGE_END} were "
        "trained, so their rows are kept; put the config.json of the language model there to start from the mean row",
        stacklevel=2,
    )
    return True
