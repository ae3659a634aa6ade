"""SliME's resampler and the adapter of the global view with its two experts.

N views, T tokens of a view, Q queries, W width of the tower.
"""

import math

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.runtime import BuildContext
from mindvlm.models.slime.model_config import RESAMPLER_HEAD_DIM
from mindvlm.models.slime.positions import resize_matrix
from mindvlm.nn.dropout import RowNoise
from mindvlm.nn.layout import read_with, widen
from mindvlm.nn.linear import Linear
from mindvlm.nn.mlp import activation
from mindvlm.nn.multi_head import MultiHeadCore
from mindvlm.nn.norm import LayerNorm

NORM_EPS = 1e-6
# least standard deviation of the gate's noise
MIN_NOISE = 0.01


class CrossAttention(nn.Cell):
    """Multi-head attention with separate queries, keys and values, and biases.

    query (Q, W), the same for all views; key, value (N, T, W) -> (N, Q, W).
    """

    def __init__(self, width: int, context: BuildContext):
        super().__init__()
        self.q_proj = Linear(width, width, dtype=context.dtype)
        self.k_proj = Linear(width, width, dtype=context.dtype)
        self.v_proj = Linear(width, width, dtype=context.dtype)
        self.out_proj = Linear(width, width, dtype=context.dtype)
        self.core = MultiHeadCore(width, width // RESAMPLER_HEAD_DIM, context)

    def construct(self, query, key, value):
        num_views, (num_queries, width) = key.shape[0], query.shape
        query = ops.broadcast_to(self.q_proj(query).reshape((1, num_queries, width)), (num_views, num_queries, width))
        return self.out_proj(self.core(query, self.k_proj(key), self.v_proj(value)))


class QueryResampler(nn.Cell):
    """Gathers the tokens of a view by learned queries: norm(attention(norm(query) + positions, ...)).

    The positions are fixed. For keys on a finer grid they are resized.

    Args:
        width: W.
        num_queries: Q, a square number.
        num_tokens: T, a square number.
    """

    def __init__(self, width: int, num_queries: int, num_tokens: int, context: BuildContext):
        super().__init__()
        shape, dtype = (num_queries, width), context.dtype
        self.query = Parameter(initializer("zeros", shape, dtype), name="query")
        self.pos_embed = Parameter(initializer("zeros", shape, dtype), name="pos_embed", requires_grad=False)
        self.attn = CrossAttention(width, context)
        self.ln_q = LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.ln_kv = LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.ln_post = LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.resize = None
        if num_queries != num_tokens:
            self.resize = Tensor(resize_matrix(math.isqrt(num_queries), math.isqrt(num_tokens)))
        self.matmul = ops.MatMul()

    def key_positions(self, x):
        """Returns the positions of the keys, (T, W), for an operation with x."""
        positions = read_with(self.pos_embed, x)
        if self.resize is None:
            return positions
        return self.matmul(self.resize, positions.astype(ms.float32)).astype(positions.dtype)

    def construct(self, x):
        """x (N, T, W) -> (N, Q, W)."""
        value = self.ln_kv(x)
        key = value + widen(self.key_positions(x), value)
        query = self.ln_q(read_with(self.query, x)) + read_with(self.pos_embed, x)
        return self.ln_post(self.attn(query, key, value))


class GlobalAdapter(nn.Cell):
    """Projects the tokens of a global view with two experts that share an MLP: mlp(x) and mlp(resampler(x)).

    A gate weighs the experts for each token. `w_noise` has no effect, as in the original program.

    Args:
        width: W.
        hidden_size: width of the decoder.
        num_tokens: T.
        noise: added to the logits of the gate in training, see `SlimeModelConfig.gate_noise`; None for none.
    """

    def __init__(
        self, width: int, hidden_size: int, num_tokens: int, context: BuildContext, noise: RowNoise | None = None
    ):
        super().__init__()
        dtype = context.dtype
        self.noise = noise
        self.projection = nn.SequentialCell(
            Linear(width, hidden_size, dtype=dtype), activation("gelu"), Linear(hidden_size, hidden_size, dtype=dtype)
        )
        self.attn = QueryResampler(width, num_tokens, num_tokens, context)
        self.w_gate = Parameter(initializer("zeros", (width, 2), dtype), name="w_gate")
        self.w_noise = Parameter(initializer("zeros", (width, 2), dtype), name="w_noise")
        self.matmul = ops.MatMul()
        self.softmax = ops.Softmax(-1)

    def gates(self, x):
        """Returns the weights of the two experts for each token: x (N, T, W) -> (N, T, 2) float32."""
        rows, weight = x.reshape((-1, x.shape[-1])).astype(ms.float32), read_with(self.w_gate, x).astype(ms.float32)
        logits = self.matmul(rows, weight)
        if self.training and self.noise is not None:
            values = self.noise(x.shape[0], 2 * x.shape[1]).reshape(logits.shape)
            logits = logits + values * (ops.softplus(logits) + MIN_NOISE)
        gates = self.softmax(logits)
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-6)
        return gates.reshape(x.shape[:-1] + (2,))

    def construct(self, x):
        """x (N, T, W) -> (N, T, hidden)."""
        gates = self.gates(x).astype(x.dtype)
        first, second = self.projection(x), self.projection(self.attn(x))
        return first * widen(gates[..., :1], first) + second * widen(gates[..., 1:], second)


class MlpAdapter(GlobalAdapter):
    """`GlobalAdapter` with the first expert alone."""

    def construct(self, x):
        return self.projection(x)


class ResamplerAdapter(GlobalAdapter):
    """`GlobalAdapter` with the second expert alone."""

    def construct(self, x):
        return self.projection(self.attn(x))


ADAPTERS = {"learned": GlobalAdapter, "mlp": MlpAdapter, "resampler": ResamplerAdapter}
