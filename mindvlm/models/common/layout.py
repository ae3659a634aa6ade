"""Reordering and broadcasting that stay small on the CPU backend.

Its Transpose keeps a table of 8 bytes for every element it moves, and its broadcasting arithmetic one of 16 bytes for
every element of the result, as long as the graph lives: several GiB for a full-size Vary-toy. Gather and BroadcastTo
keep none.
"""

import mindspore as ms
from mindspore import ops


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
    order = ops.arange(num_rows).astype(ms.int32).reshape(leading).transpose(permutation).reshape((-1,))
    shape = ()
    for axis in permutation:
        shape = shape + (leading[axis],)
    return ops.gather(x.reshape((num_rows, x.shape[-1])), order, 0).reshape(shape + (x.shape[-1],))


# Below this many elements the tables do not matter and one operator less is faster.
MAX_BROADCAST_ELEMENTS = 2**15


def widen(small, x):
    """`small` broadcast to the shape of x, to be combined with it; returned as it is where x is small itself."""
    if small.shape == x.shape or x.size <= MAX_BROADCAST_ELEMENTS:
        return small
    return ops.broadcast_to(small, x.shape)
