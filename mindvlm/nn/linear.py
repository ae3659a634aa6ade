"""Cells with a weight matrix, whose parameters are named as in torch (`weight`, `bias`).

A `Linear` is a weight product, an optional low-rank adapter and a bias. The product decides how the matrix is stored
and multiplied; `mindvlm.nn.linear_plan` replaces it in a built model.
"""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.nn.layout import read_with
from mindvlm.nn.loss import NextTokenLoss
from mindvlm.nn.products import DenseProduct, WeightProduct


class WeightCell(nn.Cell):
    """Base of the Cells with one weight matrix, stored in checkpoints under the Cell's name and `.weight`.

    Attributes:
        product: the `WeightProduct` that holds the matrix.
    """

    def __init__(self, shape: tuple[int, int], dtype):
        super().__init__()
        self.set_product(DenseProduct(shape, dtype))

    def set_product(self, product: WeightProduct) -> None:
        """Replaces the product by an unloaded one of the same shape."""
        if "weight" in self._params:
            del self.weight
        self.product = product
        if isinstance(product, DenseProduct):
            # registered here too, so that its name is `weight` and not `product.weight`
            product.weight.name = "weight"
            self.weight = product.weight


class Linear(WeightCell):
    """y = x W^T + b.

    Parameters allocate memory when they are first filled, so building a model needs none.

    Args:
        in_features, out_features: sizes of the last axis before and after.
        has_bias: adds `bias` of shape (out_features,).
        dtype: dtype of the parameters.

    Shapes: `weight` (out_features, in_features) as in torch; x (..., in_features) -> (..., out_features).

    Attributes:
        is_adapted: whether a low-rank adapter is added; see `mindvlm.nn.lora.adapt`.
        native: product and bias in one operator, see `native_form`; None without.
    """

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = True, dtype=ms.float32):
        super().__init__((out_features, in_features), dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = has_bias
        if has_bias:
            self.bias = Parameter(initializer("zeros", (out_features,), dtype), name="bias")
        self.bias_add = ops.BiasAdd()
        self.is_adapted = False
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.linear(self)

    def construct(self, x):
        if self.native:
            return self.native(x, *matrices((self,)))
        rows = x.reshape((-1, self.in_features))
        y = self.product(rows)
        if self.is_adapted:
            y = y + self.lora(rows, read_with(self.lora_A, rows), read_with(self.lora_B, rows))
        y = self.complete(y)
        if self.has_bias:
            y = self.bias_add(y, read_with(self.bias, y))
        return y.reshape(x.shape[:-1] + (self.out_features,))

    def complete(self, y):
        """Completes the outputs before the bias; a tensor-parallel subclass sums the shares of all ranks."""
        return y


def matrices(linears):
    """Returns the handles of the native products of Linears, then their biases, if any, as operators take them."""
    handles, biases = (), ()
    for linear in linears:
        handles = handles + (linear.product.handle,)
        if linear.has_bias:
            biases = biases + (linear.bias,)
    return handles + biases


class Embedding(WeightCell):
    """A table lookup. `weight` (num_embeddings, embedding_dim); ids (...) int32 -> (..., embedding_dim)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype=ms.float32):
        super().__init__((num_embeddings, embedding_dim), dtype)

    def construct(self, ids):
        return self.product.rows(ids)


class Head(Linear):
    """The Linear that computes logits, without bias. x (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = False, dtype=ms.float32):
        super().__init__(in_features, out_features, has_bias=has_bias, dtype=dtype)
        self.token_loss = NextTokenLoss()

    def loss_sum(self, states, labels):
        """Returns the sum of the next-token losses and their number, float32 scalars.

        Args:
            states: (B, L, in_features); position l predicts label l + 1.
            labels: (B, L) or (B, L + 1) int32, -100 to ignore.
        """
        states, matrix = self.factors(states)
        return self.token_loss(states, matrix, labels)

    def factors(self, states):
        """Returns states (..., D) and a matrix (out_features, D) whose product is the logits; the loss takes both."""
        matrix = self.product.matrix(states)
        if self.is_adapted:
            return self.lora.widened(states, matrix, self.lora_A, self.lora_B)
        return states, matrix


class BiasedHead(Head):
    """A Head with bias, as in the published Phi-2."""

    def __init__(self, in_features: int, out_features: int, *, dtype=ms.float32):
        super().__init__(in_features, out_features, has_bias=True, dtype=dtype)

    def factors(self, states):
        """See `Head.factors`; the bias becomes the weight of an additional state that is always 1."""
        ones = ops.ones(states.shape[:-1] + (1,), states.dtype)
        states, matrix = super().factors(states)
        return ops.concat((states, ones), -1), ops.concat((matrix, self.bias.reshape((-1, 1))), 1)


class TiedHead(nn.Cell):
    """A head that shares the matrix of the token embeddings and has no parameter of its own.

    x (..., embedding_dim) -> (..., num_embeddings).
    """

    def __init__(self, embedding: Embedding):
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self.token_loss = NextTokenLoss()

    def construct(self, x):
        y = self.embedding.product(x.reshape((-1, x.shape[-1])))
        return y.reshape(x.shape[:-1] + (-1,))

    def loss_sum(self, states, labels):
        """See `Head.loss_sum`."""
        return self.token_loss(states, self.embedding.product.matrix(states), labels)
