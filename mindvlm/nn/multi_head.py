"""Attention of all heads between the projections of queries, keys and values and that of the output.

N images, L queries, S keys, H heads, D head dimension.
"""

from mindspore import nn

from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.nn.attention_core import attention_core
from mindvlm.nn.fused_attention import (
    HEAD_DIM_UNIT,
    FusedAttention,
    PaddedFusedAttention,
    can_fuse,
    padded_head_dim,
)
from mindvlm.nn.layout import permute_rows


class MultiHeadCore(nn.Cell):
    """softmax(query key^T / sqrt D) value for every head, with all keys visible.

    query (N, L, H * D), key and value (N, S, H * D) -> (N, L, H * D).

    Args:
        width: H * D.
        num_heads: H.

    Attributes:
        native: see `native_form`; None without.
    """

    def __init__(self, width: int, num_heads: int, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scale = self.head_dim**-0.5
        if not can_fuse(context, padded_head_dim(self.head_dim)):
            self.core = attention_core()
        elif self.head_dim % HEAD_DIM_UNIT:
            self.core = PaddedFusedAttention()
        else:
            self.core = FusedAttention()
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.multi_head_attention(self.num_heads)

    def split_heads(self, x):
        return permute_rows(x.reshape((x.shape[0], x.shape[1], self.num_heads, self.head_dim)), (0, 2, 1))

    def construct(self, query, key, value):
        if self.native:
            return self.native(query, key, value)
        out = self.core(self.split_heads(query * self.scale), self.split_heads(key), self.split_heads(value))
        return permute_rows(out, (0, 2, 1)).reshape(query.shape)
