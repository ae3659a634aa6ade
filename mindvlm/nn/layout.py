"""Transposition and broadcasting with little memory on the CPU backend.

For the lifetime of the graph, Transpose keeps a table of 8 bytes per element, and broadcasting arithmetic one of 16
bytes per element of the result: several GiB for a full-size Vary-toy. Gather and BroadcastTo keep no table.
"""

import math

import numpy as np
from mindspore import Tensor, ops


def permute_rows(x, permutation: tuple[int, ...]):
    """Computes x.transpose((*permutation, last axis)) as a gather of whole rows.

    Args:
        x: any shape; its last axis stays last.
        permutation: order of the other axes.
    """
    leading = x.shape[:-1]
    num_rows = 1
    for size in leading:
        num_rows = num_rows * size
    order = row_order(leading, permutation)
    shape = ()
    for axis in permutation:
        shape = shape + (leading[axis],)
    return ops.gather(x.reshape((num_rows, x.shape[-1])), order, 0).reshape(shape + (x.shape[-1],))


def read_with(parameter, x):
    """Returns the parameter for an operation with x, so that a training step frees the result after its last use.

    MindSpore keeps the results of all operators that read a parameter until the parameter is updated. Read through
    Depend, only the parameter itself is kept. The order stays correct: the update needs the norm of all gradients.
    """
    return ops.depend(parameter, x)


@ops.constexpr
def row_order(leading: tuple[int, ...], permutation: tuple[int, ...]) -> Tensor:
    """Returns the source row of each row of the permuted tensor, int32."""
    return Tensor(np.arange(math.prod(leading), dtype=np.int32).reshape(leading).transpose(permutation).reshape(-1))


# Up to this many elements the tables are negligible, and saving an operator is faster.
MAX_BROADCAST_ELEMENTS = 2**15


def widen(small, x):
    """Broadcasts `small` to the shape of x for an operation with x; returns it unchanged if x is small too."""
    if small.shape == x.shape or x.size <= MAX_BROADCAST_ELEMENTS:
        return small
    return ops.broadcast_to(small, x.shape)
