"""Collectives inside a graph, and the pairs with the gradients of tensor parallelism (arXiv 1909.08053).

The CPU backend can only sum floats over a group: it has no maximum and no integers, and AllGather and Broadcast only
for the group of all processes. Gathering is therefore a sum of parts that are zero elsewhere: exact, and the same graph
on every rank. The graphs of all ranks must contain the same collectives in the same order.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops


class Identity(nn.Cell):
    """Replaces a collective over a group of one member."""

    def construct(self, x):
        return x


class SumOver(nn.Cell):
    """The sum of x over a group. Its gradient is the sum of the gradients."""

    def __init__(self, group: str):
        super().__init__()
        self.all_reduce = ops.AllReduce(ops.ReduceOp.SUM, group)

    def construct(self, x):
        return self.all_reduce(x)


class CopyToRanks(SumOver):
    """Forward x, backward the sum of the gradients: for x that enters a divided region."""

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        return (self.all_reduce(dout),)


class ReduceFromRanks(SumOver):
    """Forward the sum over the group, backward the gradient: for partial results that leave a divided region."""

    def bprop(self, x, out, dout):
        return (dout,)


def over_group(collective: type[SumOver], group: str, size: int) -> nn.Cell:
    """The collective, or an Identity where the group has one member."""
    return collective(group) if size > 1 else Identity()


class PlaceAmongRanks(nn.Cell):
    """x (n,) -> (size, n): x in the row of this rank, zeros elsewhere."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rows = Tensor([0 if i == rank else 1 for i in range(size)], ms.int32)

    def construct(self, x):
        row = x.reshape((1, -1))
        return ops.gather(ops.concat((row, ops.zeros_like(row)), 0), self.rows, 0)


class GatherColumns(nn.Cell):
    """x (..., n) of each rank -> (..., size * n), the ranks' columns side by side; backward its own columns.

    Args:
        group: name of the group.
        rank: this process's position in it.
        size: number of its members.
    """

    def __init__(self, group: str, rank: int, size: int):
        super().__init__()
        self.size, self.rank = size, rank
        self.place = PlaceAmongRanks(rank, size)
        self.reduce = over_group(ReduceFromRanks, group, size)

    def construct(self, x):
        columns = x.shape[-1]
        parts = self.reduce(self.place(x.reshape((-1,)))).reshape((self.size, -1, columns))
        side_by_side = ops.concat(ops.unstack(parts, 0), -1)
        return side_by_side.reshape(x.shape[:-1] + (self.size * columns,))

    def own(self, x):
        """x (..., size * n) -> the columns of this rank, (..., n)."""
        return ops.chunk(x, self.size, -1)[self.rank]
