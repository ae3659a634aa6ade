"""Cross-entropy over a vocabulary that is divided over the tensor-parallel ranks."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindvlm.nn.layout import widen
from mindvlm.nn.loss import IGNORED_LABEL
from mindvlm.parallel.collectives import PlaceAmongRanks, ReduceFromRanks, SumOver, over_group
from mindvlm.parallel.mesh import Mesh


class VocabParallelTokenLoss(nn.Cell):
    """Cross-entropy of each token in float32 without gathering the logits: three numbers a token cross the ranks.

    Shapes: logits (T, V / tp), the rank's columns; target (T,) int32 over the whole vocabulary, -100 to ignore ->
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
        # the backend sums over ranks but has no maximum over them
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
            logits: (B, L, V / tp), those at position l predict label l + 1.
            labels: (B, L) int32, -100 to ignore.
        """
        target = labels[:, 1:].reshape((-1,))
        losses = self.construct(logits[:, :-1].reshape((-1, logits.shape[-1])), target)
        return losses.sum(), (target != IGNORED_LABEL).astype(ms.float32).sum()
