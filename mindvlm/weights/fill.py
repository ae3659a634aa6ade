"""Filling a Cell's parameters, one tensor at a time."""

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindvlm.core.errors import UserError


def parameter_shapes(cell: nn.Cell) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the Cell's order. Costs no memory before the parameters are filled."""
    return {name: tuple(parameter.shape) for name, parameter in cell.parameters_and_names()}


def fill_parameters(
    cell: nn.Cell, read: Callable[[str], np.ndarray], *, progress: Callable[[str], None] | None = None
) -> None:
    """Gives every parameter its values.

    A float32 array becomes the parameter's own memory, so the whole costs the parameters plus one tensor.

    Args:
        cell: the model.
        read: name -> float32 or float16 array of the parameter's shape.
        progress: called with each name that is done.

    Raises:
        UserError: an array has another shape, or holds a value that the parameter's dtype cannot.
    """
    for name, parameter in cell.parameters_and_names():
        array = np.ascontiguousarray(read(name))
        if array.shape != tuple(parameter.shape):
            raise UserError(f"tensor {name} has shape {list(array.shape)}; the model expects {list(parameter.shape)}")
        parameter.set_data(to_tensor(name, array, parameter.dtype))
        if progress:
            progress(name)


def to_tensor(name: str, array: np.ndarray, dtype) -> Tensor:
    if dtype == ms.float16 and array.dtype != np.float16:
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float16)
        if np.isinf(narrow).any() and not np.isinf(array).any():
            raise UserError(f"tensor {name} has values beyond float16; set dtype: bfloat16 or float32")
        array = narrow
    if dtype == ms.float32:
        array = array.astype(np.float32, copy=False)
    tensor = Tensor.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
