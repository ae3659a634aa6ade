"""Rows of tensors, taken and joined outside of graphs.

On a CPU this is done on the host, because each call of an operator such as ops.concat outside of a graph takes memory
that MindSpore does not free.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from mindspore import Tensor, ops

from mindvlm.core import runtime


def wrapped(array: np.ndarray) -> Tensor:
    """Returns a Tensor in the memory of an array, which takes a seventh of the time of a copy even for few numbers."""
    return Tensor.from_numpy(array)


def rows_between(tensor: Tensor, start: int, end: int) -> Tensor:
    """Returns rows of a tensor; all of them, and those on the host, without a copy."""
    if end - start == len(tensor):
        return tensor
    return wrapped(tensor.asnumpy()[start:end]) if works_on_host() else tensor[start:end]


def concatenated(tensors: Iterable[Tensor]) -> Tensor | None:
    """Concatenates tensors along the first axis; returns None if there are none."""
    tensors = tuple(tensors)
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    if works_on_host():
        return wrapped(np.concatenate([tensor.asnumpy() for tensor in tensors]))
    return ops.concat(tensors, 0)


def padded(rows: Tensor, num_rows: int) -> Tensor:
    """Returns rows (R, columns) followed by zeros, (num_rows, columns); without a copy if none are missing."""
    if len(rows) == num_rows:
        return rows
    if works_on_host():
        given = rows.asnumpy()
        array = np.zeros((num_rows, given.shape[1]), given.dtype)
        array[: len(given)] = given
        return wrapped(array)
    return ops.concat((rows, ops.zeros((num_rows - len(rows), rows.shape[1]), rows.dtype)), 0)


def rows_at(tensor: Tensor, indices: np.ndarray) -> Tensor:
    """Returns the rows of a tensor at the indices (R,) int32, which are at least 0; all in order without a copy."""
    if np.array_equal(indices, np.arange(len(tensor))):
        return tensor
    return wrapped(tensor.asnumpy()[indices]) if works_on_host() else ops.gather(tensor, Tensor(indices), 0)


def with_rows(tensor: Tensor, other: Tensor, indices: Sequence[int]) -> Tensor:
    """Returns a tensor (R, columns) with the rows of another of its shape at the indices."""
    if works_on_host():
        rows = tensor.asnumpy().copy()
        rows[indices] = other.asnumpy()[indices]
        return wrapped(rows)
    is_other = np.zeros((len(tensor), 1), np.bool_)
    is_other[indices] = True
    return ops.select(Tensor(is_other), other, tensor)


def works_on_host() -> bool:
    """Whether rows are put together on the host."""
    return runtime.current_device() == "CPU"
