"""The places where a weight matrix meets an activation: Linear and Embedding, named as in torch (`weight`, `bias`)."""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.nn.layout import read_with
from mindvlm.nn.loss import NextTokenLoss


class Linear(nn.Cell):
    """y = x W^T + b.

    Uses `MatMul(transpose_b=True)`, the only weight product that is fast on the CPU backend. Parameters take memory
    when they are first filled, so building a model costs nothing.

    Args:
        in_features, out_features: sizes of the last axis before and after.
        has_bias: adds `bias` of shape (out_features,).
        dtype: of the parameters.

    Shapes: `weight` (out_features, in_features) as in torch; x (..., in_features) -> (..., out_features).

    Attributes:
        is_adapted: whether a low-rank change is added; see `mindvlm.nn.lora.adapt`.
    """

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = True, dtype=ms.float32):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = has_bias
        self.weight = Parameter(initializer("zeros", (out_features, in_features), dtype), name="weight")
        if has_bias:
            self.bias = Parameter(initializer("zeros", (out_features,), dtype), name="bias")
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()
        self.is_adapted = False

    def construct(self, x):
        rows = x.reshape((-1, self.in_features))
        y = self.matmul(rows, read_with(self.weight, rows))
        if self.is_adapted:
            y = y + self.lora(rows, read_with(self.lora_A, rows), read_with(self.lora_B, rows))
        if self.has_bias:
            y = self.bias_add(y, read_with(self.bias, y))
        return y.reshape(x.shape[:-1] + (self.out_features,))


class Embedding(nn.Cell):
    """Rows of a table. `weight` (num_embeddings, embedding_dim); ids (...) int32 -> (..., embedding_dim)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype=ms.float32):
        super().__init__()
        self.weight = Parameter(initializer("zeros", (num_embeddings, embedding_dim), dtype), name="weight")
        self.gather = ops.Gather()

    def construct(self, ids):
        return self.gather(self.weight, ids, 0)


class Head(Linear):
    """The Linear that gives logits; it has no bias. x (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, dtype=ms.float32):
        super().__init__(in_features, out_features, has_bias=False, dtype=dtype)
        self.token_loss = NextTokenLoss()

    def loss_sum(self, states, labels):
        """Sum of the next-token losses and their number, float32 scalars.

        Args:
            states: (B, L, in_features), those at position l predict label l + 1.
            labels: (B, L) int32, -100 to ignore.
        """
        matrix = read_with(self.weight, states)
        if self.is_adapted:
            states, matrix = self.lora.widened(states, matrix, self.lora_A, self.lora_B)
        return self.token_loss(states, matrix, labels)


class BiasedHead(Linear):
    """A Head whose logits have a bias, as Phi-2 was published."""

    def __init__(self, in_features: int, out_features: int, *, dtype=ms.float32):
        super().__init__(in_features, out_features, dtype=dtype)
        self.token_loss = NextTokenLoss()

    def loss_sum(self, states, labels):
        """As that of `Head`: the bias is the weight of one more state that is always 1."""
        ones, matrix = ops.ones(states.shape[:-1] + (1,), states.dtype), self.weight
        if self.is_adapted:
            states, matrix = self.lora.widened(states, matrix, self.lora_A, self.lora_B)
        states = ops.concat((states, ones), -1)
        matrix = ops.concat((matrix, self.bias.reshape((-1, 1))), 1)
        return self.token_loss(states, matrix, labels)


class TiedHead(nn.Cell):
    """The head whose matrix is the table of token embeddings; it has no parameter of its own.

    x (..., embedding_dim) -> (..., num_embeddings).
    """

    def __init__(self, embedding: Embedding):
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self.matmul = ops.MatMul(transpose_b=True)
        self.token_loss = NextTokenLoss()

    def construct(self, x):
        table = self.embedding.weight
        y = self.matmul(x.reshape((-1, table.shape[1])), table)
        return y.reshape(x.shape[:-1] + (table.shape[0],))

    def loss_sum(self, states, labels):
        """As that of `Head`."""
        return self.token_loss(states, read_with(self.embedding.weight, states), labels)
