"""Rows of tensors, taken and joined outside of graphs.

On a CPU this is done on the host, because each call of an operator such as ops.concat outside of a graph takes memory
that MindSpore does not free.
"""

from collections.abc import Iterable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops


def rows_between(tensor: Tensor, start: int, end: int) -> Tensor:
    """Returns rows of a tensor; all of them without a copy, which takes MindSpore as long as a small graph."""
    return tensor if end - start == len(tensor) else tensor[start:end]


def concatenated(tensors: Iterable[Tensor]) -> Tensor | None:
    """Concatenates tensors along the first axis; returns None if there are none."""
    tensors = tuple(tensors)
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    if works_on_host():
        return Tensor(np.concatenate([tensor.asnumpy() for tensor in tensors]))
    return ops.concat(tensors, 0)


def rows_at(tensor: Tensor, indices: np.ndarray) -> Tensor:
    """Returns the rows of a tensor at the indices (R,) int32, which are at least 0; all in order without a copy."""
    if np.array_equal(indices, np.arange(len(tensor))):
        return tensor
    return Tensor(tensor.asnumpy()[indices]) if works_on_host() else ops.gather(tensor, Tensor(indices), 0)


def works_on_host() -> bool:
    """Whether rows are put together on the host."""
    return ms.get_context("device_target") == "CPU"
