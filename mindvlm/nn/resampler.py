"""Learned queries that gather image features by cross-attention (Perceiver, arXiv 2103.03206; Flamingo, arXiv
2204.14198), in the form of TinyLLaVABench's `Resampler`.

N images, T tokens an image, Q queries.
"""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.nn.config import FEED_FORWARD_FACTOR
from mindvlm.nn.linear import Linear
from mindvlm.nn.mlp import activation
from mindvlm.nn.multi_head import MultiHeadCore
from mindvlm.nn.norm import LayerNorm

NORM_EPS = 1e-5


class FeedForward(nn.SequentialCell):
    """linear(gelu(linear(norm x))) without biases. x (..., width) -> the same shape."""

    def __init__(self, width: int, dtype):
        inner = FEED_FORWARD_FACTOR * width
        super().__init__(
            LayerNorm(width, eps=NORM_EPS, dtype=dtype),
            Linear(width, inner, has_bias=False, dtype=dtype),
            activation("gelu"),
            Linear(inner, width, has_bias=False, dtype=dtype),
        )


class ResamplerBlock(nn.Cell):
    """queries += attention(queries, image); queries += feed_forward(queries)."""

    def __init__(self, width: int, image_width: int, num_heads: int, dtype):
        super().__init__()
        self.norm_image = LayerNorm(image_width, eps=NORM_EPS, dtype=dtype)
        self.norm_hidden = LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.to_q = Linear(width, width, has_bias=False, dtype=dtype)
        self.to_k = Linear(image_width, width, has_bias=False, dtype=dtype)
        self.to_v = Linear(image_width, width, has_bias=False, dtype=dtype)
        self.to_out = Linear(width, width, has_bias=False, dtype=dtype)
        self.feed_forward = FeedForward(width, dtype)
        self.core = MultiHeadCore(width, num_heads)

    def construct(self, queries, image):
        """queries (N, Q, width), image (N, T, image_width) -> (N, Q, width)."""
        image = self.norm_image(image)
        attended = self.core(self.to_q(self.norm_hidden(queries)), self.to_k(image), self.to_v(image))
        queries = queries + self.to_out(attended)
        return queries + self.feed_forward(queries)


class Resampler(nn.Cell):
    """Maps an image of any number of tokens to a fixed number of features.

    Args:
        image_width: width of the input features.
        width: width of the queries.
        out_width: width of the output features.
        num_queries: Q.
        num_layers: number of blocks.
        num_heads: heads per block; must divide `width`.
    """

    def __init__(
        self,
        image_width: int,
        *,
        width: int,
        out_width: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        dtype=ms.float32,
    ):
        super().__init__()
        self.queries = Parameter(initializer("zeros", (num_queries, width), dtype), name="queries")
        blocks = [ResamplerBlock(width, image_width, num_heads, dtype) for _ in range(num_layers)]
        self.resampler_blocks = nn.CellList(blocks)
        self.post_norm = LayerNorm(width, eps=NORM_EPS, dtype=dtype)
        self.final_proj = Linear(width, out_width, has_bias=False, dtype=dtype)

    def construct(self, image):
        """image (N, T, image_width) -> (N, Q, out_width)."""
        shape = (image.shape[0], *self.queries.shape)
        queries = ops.broadcast_to(ops.expand_dims(self.queries, 0), shape)
        for block in self.resampler_blocks:
            queries = block(queries, image)
        return self.final_proj(self.post_norm(queries))
