"""Linear, Embedding and norm Cells whose weights are divided over the tensor-parallel ranks (arXiv 1909.08053).

A region that the ranks share begins at a norm, whose output all of them hold, and ends at a `RowParallelLinear`. B
batch, L length, V vocabulary; n stands for the number of tensor-parallel ranks.
"""

import mindspore as ms
from mindspore import Tensor, ops

from mindvlm.nn.layout import read_with, widen
from mindvlm.nn.linear import Embedding, Linear, TiedHead
from mindvlm.nn.norm import LayerNorm, RMSNorm
from mindvlm.parallel.collectives import CopyToRanks, GatherColumns, ReduceFromRanks, over_group
from mindvlm.parallel.loss import VocabParallelTokenLoss
from mindvlm.parallel.mesh import Mesh


class EnteringRMSNorm(RMSNorm):
    """An RMSNorm whose output enters column-parallel layers and nothing else: its gradient is summed over the ranks."""

    def __init__(self, hidden_size: int, *, eps: float, mesh: Mesh, dtype=ms.float32):
        super().__init__(hidden_size, eps=eps, dtype=dtype)
        self.enter = over_group(CopyToRanks, mesh.tp_group, mesh.tp)

    def construct(self, x):
        return self.enter(super().construct(x))


class EnteringLayerNorm(LayerNorm):
    """A LayerNorm whose output enters column-parallel layers and nothing else."""

    def __init__(self, hidden_size: int, *, eps: float, mesh: Mesh, dtype=ms.float32):
        super().__init__(hidden_size, eps=eps, dtype=dtype)
        self.enter = over_group(CopyToRanks, mesh.tp_group, mesh.tp)

    def construct(self, x):
        return self.enter(super().construct(x))


class ColumnParallelLinear(Linear):
    """The rank's share of the outputs: x (..., in_features), the same on every rank -> (..., out_features / n).

    `weight` (out_features / n, in_features) and `bias` (out_features / n,). x comes from an entering norm, which sums
    its gradient once for all layers that take it.
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh, has_bias: bool = True, dtype=ms.float32):
        super().__init__(in_features, out_features // mesh.tp, has_bias=has_bias, dtype=dtype)


class RowParallelLinear(Linear):
    """The sum of what the ranks' inputs give: x (..., in_features / n) -> (..., out_features), the same on every rank.

    `weight` (out_features, in_features / n); `bias` (out_features,) is whole and added once, after the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh, has_bias: bool = True, dtype=ms.float32):
        super().__init__(in_features // mesh.tp, out_features, has_bias=has_bias, dtype=dtype)
        self.leave = over_group(ReduceFromRanks, mesh.tp_group, mesh.tp)

    def construct(self, x):
        rows = x.reshape((-1, self.in_features))
        y = self.matmul(rows, read_with(self.weight, rows))
        if self.is_adapted:
            y = y + self.lora(rows, read_with(self.lora_A, rows), read_with(self.lora_B, rows))
        y = self.leave(y)
        if self.has_bias:
            y = self.bias_add(y, read_with(self.bias, y))
        return y.reshape(x.shape[:-1] + (self.out_features,))


class VocabParallelEmbedding(Embedding):
    """The rank holds the rows of its share of the ids; the others' rows count as zero before the sum.

    `weight` (num_embeddings / n, embedding_dim); ids (...) int32 -> (..., embedding_dim).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, mesh: Mesh, dtype=ms.float32):
        super().__init__(num_embeddings // mesh.tp, embedding_dim, dtype=dtype)
        self.num_rows = num_embeddings // mesh.tp
        self.start = Tensor(mesh.tp_rank * self.num_rows, ms.int32)
        self.leave = over_group(ReduceFromRanks, mesh.tp_group, mesh.tp)

    def construct(self, ids):
        rows = ids - self.start
        here = ops.logical_and(rows >= 0, rows < self.num_rows)
        values = self.gather(self.weight, ops.clamp(rows, 0, self.num_rows - 1), 0)
        return self.leave(values * widen(ops.expand_dims(here.astype(values.dtype), -1), values))


class VocabParallelHead(ColumnParallelLinear):
    """The head with its rows divided; called as it is, it gives the logits of all ranks, as the plain one does.

    x (..., in_features) -> (..., V). The loss leaves the logits where they are: (..., V / n).
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh, has_bias: bool = False, dtype=ms.float32):
        super().__init__(in_features, out_features, mesh=mesh, has_bias=has_bias, dtype=dtype)
        self.gather_columns = GatherColumns(mesh.tp_group, mesh.tp_rank, mesh.tp)
        self.token_loss = VocabParallelTokenLoss(out_features, mesh)

    def construct(self, x):
        return self.gather_columns(super().construct(x))

    def loss_sum(self, states, labels):
        """As that of the plain head; the same on every rank."""
        return self.token_loss.sum_and_count(super().construct(states), labels)


class VocabParallelTiedHead(TiedHead):
    """The head that shares the rows of a `VocabParallelEmbedding`; otherwise as `VocabParallelHead`."""

    def __init__(self, embedding: VocabParallelEmbedding, *, mesh: Mesh):
        super().__init__(embedding)
        self.gather_columns = GatherColumns(mesh.tp_group, mesh.tp_rank, mesh.tp)
        self.token_loss = VocabParallelTokenLoss(embedding.num_rows * mesh.tp, mesh)

    def construct(self, x):
        return self.gather_columns(super().construct(x))

    def loss_sum(self, states, labels):
        return self.token_loss.sum_and_count(super().construct(states), labels)
