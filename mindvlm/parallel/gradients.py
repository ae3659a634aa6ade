"""Sums of gradients over replicas, whole or one chunk for each replica."""

import mindspore as ms
from mindspore import Parameter, nn, ops

from mindvlm.parallel.buckets import Bucket
from mindvlm.parallel.collectives import SumOver, over_group
from mindvlm.parallel.mesh import Mesh


class ScatterSum(nn.Cell):
    """This replica's chunk of the sum over the replicas: (dp * chunk_size,) -> (chunk_size,).

    The CPU backend has no ReduceScatter: there the whole sum is computed and the other chunks are dropped.
    """

    def __init__(self, bucket: Bucket, mesh: Mesh):
        super().__init__(auto_prefix=False)
        self.has_reduce_scatter = mesh.device == "Ascend" and mesh.dp > 1
        self.bucket = bucket
        if self.has_reduce_scatter:
            self.reduce_scatter = ops.ReduceScatter(ops.ReduceOp.SUM, mesh.dp_group)
        else:
            self.sum = over_group(SumOver, mesh.dp_group, mesh.dp)

    def construct(self, flat):
        if self.has_reduce_scatter:
            return self.reduce_scatter(flat)
        return self.bucket.own_chunk(self.sum(flat))


class GradientSync(nn.Cell):
    """Sums gradients over the replicas.

    Pass gradients of the *sum* of the token losses, and divide by the number of labels of all replicas (`total`): then
    every label has the same weight, however the replicas' batches differ.

    Args:
        parameters: the trained ones.
        buckets: the buckets of these parameters.
        mesh: this process's mesh.
        partial: names of whole parameters whose gradients are also summed over the tensor-parallel ranks.
        keep_chunks: return this replica's chunk of every bucket instead of whole gradients (ZeRO-2).
    """

    def __init__(
        self,
        parameters: list[Parameter],
        buckets: nn.CellList,
        mesh: Mesh,
        *,
        partial: set[str] = frozenset(),
        keep_chunks: bool = False,
    ):
        super().__init__(auto_prefix=False)
        self.buckets = buckets
        self.keep_chunks = keep_chunks
        self.is_partial = tuple(parameter.name in partial and mesh.tp > 1 for parameter in parameters)
        self.over_dp = over_group(SumOver, mesh.dp_group, mesh.dp)
        self.over_tp = over_group(SumOver, mesh.tp_group, mesh.tp)
        self.scatter_sums = nn.CellList([ScatterSum(bucket, mesh) for bucket in buckets], auto_prefix=False)
        divided = {i for bucket in buckets if bucket.is_divided for i in bucket.indices}
        self.is_divided = tuple(i in divided for i in range(len(parameters)))
        self.sources = positions(buckets, len(parameters))

    def construct(self, gradients):
        """Gradients in the parameters' order -> their sums, or float32 chunks of these in the buckets' order."""
        gradients = self.sum_partial(gradients)
        chunks, groups = (), ()
        for k in range(len(self.buckets)):
            flat = self.buckets[k].flatten(gradients)
            if self.keep_chunks:
                chunks = chunks + (self.scatter_sums[k](flat),)
            else:
                groups = groups + (self.buckets[k].unflatten(self.over_dp(flat)),)
        if self.keep_chunks:
            return chunks
        summed = ()
        for bucket, place in self.sources:
            summed = summed + (groups[bucket][place],)
        return summed

    def sum_partial(self, gradients):
        whole = ()
        for i in range(len(gradients)):
            whole = whole + (self.over_tp(gradients[i]) if self.is_partial[i] else gradients[i],)
        return whole

    def total(self, value):
        """A float32 scalar of each replica (number of labels, loss) -> its sum over all replicas."""
        return self.over_dp(value)

    def norm(self, synced):
        """Euclidean norm of the result of `construct` over all parameters; each part counts once."""
        whole, divided = ms.Tensor(0.0, ms.float32), ms.Tensor(0.0, ms.float32)
        if self.keep_chunks:
            for k in range(len(self.buckets)):
                square = sum_of_squares(synced[k])
                if self.buckets[k].is_divided:
                    divided = divided + square
                else:
                    whole = whole + square
            whole, divided = self.over_dp(whole), self.over_dp(divided)
        else:
            for i in range(len(synced)):
                square = sum_of_squares(synced[i])
                if self.is_divided[i]:
                    divided = divided + square
                else:
                    whole = whole + square
        return ops.sqrt(whole + self.over_tp(divided))


def sum_of_squares(x):
    """A float32 scalar. Reduces the last axis first: the CPU backend is slow when it reduces all axes at once."""
    x = x.astype(ms.float32)
    return (x * x).sum(-1).sum()


def positions(buckets: nn.CellList, num_parameters: int) -> tuple[tuple[int, int], ...]:
    """Bucket, and position in it, of each parameter."""
    found = {i: (k, place) for k, bucket in enumerate(buckets) for place, i in enumerate(bucket.indices)}
    return tuple(found[i] for i in range(num_parameters))
