"""Losses of the causal language models.

B batch, L length, V vocabulary.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

IGNORED_LABEL = -100

# Minimum rows per chunk of logits; a small vocabulary allows more. With smaller chunks, adding to the gradient
# of the head would dominate.
MIN_CHUNK_ROWS = 256
MAX_CHUNK_LOGITS = 2**22
MAX_CHUNKS = 16


class NextTokenLoss(nn.Cell):
    """Sum and number of the next-token losses, from the states before the head, without storing all logits.

    The forward pass computes the loss and the gradients of the states and of the head's matrix chunk by chunk; the
    backward pass returns these gradients. The compiler removes unused ones.

    Attributes:
        matrix_trains: False skips the gradient of the matrix, a third of the work and V x hidden float32.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.matrix_trains = True
        self.logits = ops.MatMul(transpose_b=True)
        self.product = ops.MatMul()
        self.by_columns = ops.MatMul(transpose_a=True)
        self.tile = ops.Tile()
        self.known_gradient = KnownGradient()

    def construct(self, states, matrix, labels):
        """Args:
            states: (B, L, hidden); position l predicts label l + 1.
            matrix: (V, hidden), weight of the head, of the same dtype.
            labels: (B, L) int32, -100 to ignore; (B, L + 1) if the last position has a label too.

        Returns:
            The sum and the number of losses, float32 scalars.
        """
        hidden_size = states.shape[-1]
        target = labels[:, 1:]
        if labels.shape[1] == states.shape[1]:
            target = ops.concat((target, ops.full_like(labels[:, :1], IGNORED_LABEL)), 1)
        target = target.reshape((-1,))
        counted = (target != IGNORED_LABEL).astype(ms.float32)
        loss, states_gradient, matrix_gradient = self.by_chunks(
            ops.stop_gradient(states).reshape((-1, hidden_size)), ops.stop_gradient(matrix), target, counted
        )
        states_gradient = ops.stop_gradient(states_gradient).reshape(states.shape)
        loss = self.known_gradient(ops.stop_gradient(loss), states, states_gradient)
        if self.matrix_trains:
            loss = self.known_gradient(loss, matrix, ops.stop_gradient(matrix_gradient))
        return loss, counted.sum()

    def by_chunks(self, states, matrix, target, counted):
        """states (N, hidden), matrix (V, hidden), target (N,) int32, counted (N,) float32 -> loss, float32 gradients.

        The gradients are with respect to states and matrix; the latter has one element if the matrix is frozen.
        """
        num_rows = states.shape[0]
        order = ops.argsort(ops.arange(num_rows).astype(ms.float32) - counted * num_rows).astype(ms.int32)
        back = ops.argsort(order.astype(ms.float32)).astype(ms.int32)
        states = ops.gather(states, order, 0)
        target = ops.maximum(ops.gather(target, order, 0), Tensor(0, ms.int32)).reshape((-1, 1))
        num_counted = counted.sum()
        counted = ops.gather(counted, order, 0).reshape((-1, 1))
        loss = Tensor(0.0, ms.float32)
        state_parts = ()
        matrix_gradient = ops.zeros(matrix.shape if self.matrix_trains else (1,), ms.float32)
        for start, stop in chunks(states.shape[0], matrix.shape[0]):
            part, part_target, part_counted = states[start:stop], target[start:stop], counted[start:stop]
            part_gradient = ops.zeros((stop - start, states.shape[1]), ms.float32)
            if num_counted > start:
                # sequential, so only one chunk of logits is in memory
                part = ops.depend(part, (loss, matrix_gradient))
                added_loss, logits_gradient = self.chunk(part, matrix, part_target, part_counted)
                loss = loss + added_loss
                # weighting hidden states is cheaper than weighting logits
                weights = self.tile(part_counted, (1, part.shape[1]))
                part_gradient = self.product(logits_gradient, matrix).astype(ms.float32) * weights
                if self.matrix_trains:
                    added = self.by_columns(logits_gradient, part * weights.astype(part.dtype))
                    matrix_gradient = matrix_gradient + added.astype(ms.float32)
            state_parts = state_parts + (part_gradient,)
        states_gradient = state_parts[0] if len(state_parts) == 1 else ops.concat(state_parts, 0)
        return loss, ops.gather(states_gradient, back, 0), matrix_gradient

    def chunk(self, states, matrix, target, counted):
        """Returns the loss, and the unweighted gradient of the logits: probabilities minus one at the target."""
        log_probabilities = ops.log_softmax(self.logits(states, matrix).astype(ms.float32), -1)
        picked = ops.gather_elements(log_probabilities, 1, target)
        gradient = ops.tensor_scatter_elements(ops.exp(log_probabilities), target, ops.exp(picked) - 1.0, 1)
        return -(picked * counted).sum(), gradient.astype(states.dtype)


class KnownGradient(nn.Cell):
    """Returns the loss unchanged; its gradient with respect to `x` is `gradient`."""

    def __init__(self):
        super().__init__(auto_prefix=False)

    def construct(self, loss, x, gradient):
        return loss * 1.0

    def bprop(self, loss, x, gradient, out, dout):
        return dout, (gradient * dout).astype(x.dtype), ops.zeros_like(gradient)


@ops.constexpr
def chunks(num_rows: int, vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Returns the row ranges [start, stop) of the chunks."""
    size = max(MIN_CHUNK_ROWS, MAX_CHUNK_LOGITS // vocab_size, -(-num_rows // MAX_CHUNKS))
    return tuple((start, min(start + size, num_rows)) for start in range(0, num_rows, size))
