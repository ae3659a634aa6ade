"""Reordering and broadcasting that stay small on the CPU backend.

Its Transpose keeps a table of 8 bytes for every element it moves, and its broadcasting arithmetic one of 16 bytes for
every element of the result, as long as the graph lives: several GiB for a full-size Vary-toy. Gather and BroadcastTo
keep none.
"""

import math

import numpy as np
from mindspore import Tensor, ops


def permute_rows(x, permutation: tuple[int, ...]):
    """x.transpose((*permutation, last axis)) as a gather of whole rows.

    Args:
        x: any shape; its last axis stays where it is.
        permutation: of the other axes.
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
    """The parameter, to be combined with x; in a training step a product of both is then freed after its last use.

    MindSpore puts the update of a parameter behind every operator that reads it by keeping the results of these until
    then. Read this way, the parameter itself is what is kept. The update comes after all gradients in any case, since
    it needs their norm.
    """
    return ops.depend(parameter, x)


@ops.constexpr
def row_order(leading: tuple[int, ...], permutation: tuple[int, ...]) -> Tensor:
    """For each row of the permuted tensor its row in the original, int32."""
    return Tensor(np.arange(math.prod(leading), dtype=np.int32).reshape(leading).transpose(permutation).reshape(-1))


# Below this many elements the tables do not matter and one operator less is faster.
MAX_BROADCAST_ELEMENTS = 2**15


def widen(small, x):
    """`small` broadcast to the shape of x, to be combined with it; returned as it is where x is small itself."""
    if small.shape == x.shape or x.size <= MAX_BROADCAST_ELEMENTS:
        return small
    return ops.broadcast_to(small, x.shape)
