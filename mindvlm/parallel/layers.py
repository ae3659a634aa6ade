"""Linear, Embedding, norm and loss Cells whose weights are divided over tensor-parallel ranks (arXiv 1909.08053).

A divided region begins at a norm, whose output every rank has, and ends at a `RowParallelLinear`.

B batch, L length, V vocabulary, T tokens, n tensor-parallel ranks.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindvlm.nn.layout import widen
from mindvlm.nn.linear import Embedding, Linear, TiedHead
from mindvlm.nn.loss import IGNORED_LABEL
from mindvlm.nn.norm import LayerNorm, RMSNorm
from mindvlm.parallel.collectives import (
    CopyToRanks,
    GatherColumns,
    PlaceAmongRanks,
    ReduceFromRanks,
    SumOver,
    over_group,
)
from mindvlm.parallel.mesh import Mesh


class EnteringRMSNorm(RMSNorm):
    """An RMSNorm before column-parallel layers only: sums the gradient of its output over the ranks."""

    def __init__(self, hidden_size: int, *, eps: float, mesh: Mesh, dtype=ms.float32):
        super().__init__(hidden_size, eps=eps, dtype=dtype)
        self.enter = over_group(CopyToRanks, mesh.tp_group, mesh.tp)

    def construct(self, x):
        return self.enter(super().construct(x))


class EnteringLayerNorm(LayerNorm):
    """A LayerNorm before column-parallel layers only: sums the gradient of its output over the ranks."""

    def __init__(self, hidden_size: int, *, eps: float, mesh: Mesh, dtype=ms.float32):
        super().__init__(hidden_size, eps=eps, dtype=dtype)
        self.enter = over_group(CopyToRanks, mesh.tp_group, mesh.tp)

    def construct(self, x):
        return self.enter(super().construct(x))


class ColumnParallelLinear(Linear):
    """Computes the rank's share of the outputs: x (..., in_features), equal on all ranks -> (..., out_features / n).

    `weight` (out_features / n, in_features) and `bias` (out_features / n,). The entering norm before it sums the
    gradient of x once for all Linears that take x.
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh, has_bias: bool = True, dtype=ms.float32):
        super().__init__(in_features, out_features // mesh.tp, has_bias=has_bias, dtype=dtype)


class RowParallelLinear(Linear):
    """Sums the ranks' products: x (..., in_features / n) -> (..., out_features), equal on all ranks.

    `weight` (out_features, in_features / n). `bias` (out_features,) is whole on every rank and added after the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh, has_bias: bool = True, dtype=ms.float32):
        super().__init__(in_features // mesh.tp, out_features, has_bias=has_bias, dtype=dtype)
        self.leave = over_group(ReduceFromRanks, mesh.tp_group, mesh.tp)

    def complete(self, y):
        return self.leave(y)


class VocabParallelEmbedding(Embedding):
    """Holds the rows of the rank's share of the ids; rows of other ids are zero before the sum over the ranks.

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
        values = super().construct(ops.clamp(rows, 0, self.num_rows - 1))
        return self.leave(values * widen(ops.expand_dims(here.astype(values.dtype), -1), values))


class VocabParallelTokenLoss(nn.Cell):
    """Cross-entropy of each token in float32. Exchanges three numbers a token instead of the logits.

    Shapes: logits (T, V / n), the rank's columns; target (T,) int32 over the whole vocabulary, -100 to ignore ->
    (T,) float32, 0 where ignored.

    Args:
        vocab_size: V.
        mesh: of this process.
    """

    def __init__(self, vocab_size: int, mesh: Mesh):
        super().__init__()
        self.num_columns = vocab_size // mesh.tp
        self.start = Tensor(mesh.tp_rank * self.num_columns, ms.int32)
        self.place = PlaceAmongRanks(mesh.tp_rank, mesh.tp)
        self.sum_of_maxima = over_group(SumOver, mesh.tp_group, mesh.tp)
        self.reduce = over_group(ReduceFromRanks, mesh.tp_group, mesh.tp)
        self.sum = ops.ReduceSum(keep_dims=True)
        self.max = ops.ReduceMax(keep_dims=True)

    def construct(self, logits, target):
        logits = logits.astype(ms.float32)
        own_maximum = self.max(ops.stop_gradient(logits), 1).reshape((-1,))
        # the CPU backend can sum over ranks but not take a maximum
        maximum = ops.stop_gradient(self.sum_of_maxima(self.place(own_maximum)).max(axis=0)).reshape((-1, 1))
        shifted = logits - widen(maximum, logits)
        total = self.reduce(self.sum(ops.exp(shifted), 1))
        columns = target - self.start
        here = ops.logical_and(columns >= 0, columns < self.num_columns).astype(ms.float32)
        safe = ops.clamp(columns, 0, self.num_columns - 1)
        picked = ops.gather_elements(shifted, 1, ops.expand_dims(safe, 1)).reshape((-1,))
        picked = self.reduce(picked * here)
        counted = (target != IGNORED_LABEL).astype(ms.float32)
        return (ops.log(total).reshape((-1,)) - picked) * counted

    def sum_and_count(self, logits, labels):
        """Sum of the next-token losses and their number, float32 scalars.

        Args:
            logits: (B, L, V / n), those at position l predict label l + 1.
            labels: (B, L) or (B, L + 1) int32, -100 to ignore.
        """
        target = labels[:, 1:].reshape((-1,))
        if labels.shape[1] == logits.shape[1]:
            logits = logits[:, :-1]
        losses = self.construct(logits.reshape((-1, logits.shape[-1])), target)
        return losses.sum(), (target != IGNORED_LABEL).astype(ms.float32).sum()


class VocabParallelHead(ColumnParallelLinear):
    """The head with its rows divided. A call returns the logits of all ranks; the loss works on the rank's own.

    x (..., in_features) -> (..., V).
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh, has_bias: bool = False, dtype=ms.float32):
        super().__init__(in_features, out_features, mesh=mesh, has_bias=has_bias, dtype=dtype)
        self.gather_columns = GatherColumns(mesh.tp_group, mesh.tp_rank, mesh.tp)
        self.token_loss = VocabParallelTokenLoss(out_features, mesh)

    def construct(self, x):
        return self.gather_columns(super().construct(x))

    def loss_sum(self, states, labels):
        """As in `Head`; equal on all ranks."""
        return self.token_loss.sum_and_count(super().construct(states), labels)


class VocabParallelTiedHead(TiedHead):
    """A `VocabParallelHead` that shares the rows of a `VocabParallelEmbedding`."""

    def __init__(self, embedding: VocabParallelEmbedding, *, mesh: Mesh):
        super().__init__(embedding)
        self.gather_columns = GatherColumns(mesh.tp_group, mesh.tp_rank, mesh.tp)
        self.token_loss = VocabParallelTokenLoss(embedding.num_rows * mesh.tp, mesh)

    def construct(self, x):
        return self.gather_columns(super().construct(x))

    def loss_sum(self, states, labels):
        return self.token_loss.sum_and_count(super().construct(states), labels)
