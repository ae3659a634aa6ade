"""Self-attention of the decoders.

B batch, L query length, S key length, H query heads, K key and value heads, D head dimension.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindvlm.core.runtime import BuildContext
from mindvlm.nn.attention_core import causal_attention_core, segment_attention_core, split_heads, stack_heads
from mindvlm.nn.fused_attention import FusedAttention, can_fuse, hidden_keys, later_keys
from mindvlm.nn.layout import permute_rows, widen
from mindvlm.nn.linear import Linear
from mindvlm.nn.rotary import apply_rotary


def causal_mask(query_positions, key_positions, num_heads: int, dtype):
    """Returns the additive causal mask (B, H, L, S): 0 for visible keys, the dtype's minimum for later ones.

    The mask is equal for all heads but stored for each; all layers share it.

    Args:
        query_positions: (B, L) int32.
        key_positions: (S,) int32.
        num_heads: H.
    """
    batch_size, length = query_positions.shape
    visible = key_positions.reshape((1, 1, 1, -1)) <= query_positions.reshape((batch_size, 1, length, 1))
    mask = ops.select(visible, ms.Tensor(0.0, dtype), ms.Tensor(lowest(dtype), dtype))
    return ops.broadcast_to(mask, (batch_size, num_heads, length, key_positions.shape[0]))


def lowest(dtype) -> float:
    """Returns the most negative finite number of a MindSpore float type."""
    if dtype == ms.bfloat16:
        return -3.3895313892515355e38
    return float(np.finfo(np.float16).min) if dtype == ms.float16 else float(np.finfo(np.float32).min)


class EagerAttention(nn.Cell):
    """softmax(q k^T + mask) v with the softmax in float32."""

    def __init__(self):
        super().__init__()
        self.query_key = ops.BatchMatMul(transpose_b=True)
        self.weighted_values = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def construct(self, query, key, value, mask):
        """Scaled query (B, H, L, D), key and value (B, K, S, D), additive mask (B, H, L, S) -> (B, H, L, D)."""
        scores = self.scores(stack_heads(query, key), key) + stack_heads(mask, key)
        weights = self.softmax(scores.astype(ms.float32)).astype(value.dtype)
        return split_heads(self.weighted_values(weights, value), query, query.shape[-2])

    def scores(self, query, key):
        return self.query_key(query, key)


class Float32EagerAttention(EagerAttention):
    """`EagerAttention` with float32 query-key products and a float32 mask."""

    def scores(self, query, key):
        return self.query_key(query.astype(ms.float32), key.astype(ms.float32))


def scaled(query, query_scale):
    """Multiplies query (B, H, L, D) by query_scale (B, 1, L, 1); unchanged if that is None."""
    if query_scale is None:
        return query
    return (query * widen(query_scale, query)).astype(query.dtype)


class SelfAttention(nn.Cell):
    """Multi-head self-attention without positions, in two steps: `project` and `attend`, with the KV cache between.

    Args:
        config: a `DecoderConfig`.

    Attributes:
        has_rotation: whether queries and keys are rotated by their positions.
        native: attention with a cache, see `native_form`; None without.
    """

    has_rotation = False

    def __init__(self, config, context: BuildContext):
        super().__init__()
        dtype = context.dtype
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width, key_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, width, has_bias=config.qkv_bias, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, key_width, has_bias=config.qkv_bias, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, key_width, has_bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(width, config.hidden_size, has_bias=config.o_bias, dtype=dtype)
        self.scale = self.head_dim**-0.5
        self.is_fused = can_fuse(context, self.head_dim)
        self.mask_dtype = ms.float32 if config.float32_scores else dtype
        eager = Float32EagerAttention if config.float32_scores else EagerAttention
        self.core = FusedAttention() if self.is_fused else eager()
        self.causal_core = causal_attention_core(float32_scores=config.float32_scores)
        self.segment_core = segment_attention_core()
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.cached_attention(self.head_dim, has_rotation=self.has_rotation)

    def mask(self, query_positions, key_positions):
        """Returns the causal mask for `attend`, which all layers share; positions as in `causal_mask`."""
        if self.is_fused:
            return later_keys(query_positions, key_positions)
        return causal_mask(query_positions, key_positions, self.num_heads, self.mask_dtype)

    def mask_without_cache(self, positions, segment_ids=None):
        """Returns the mask for `attend` with queries and keys of the same tokens; None if not needed.

        Args:
            positions: (B, L) int32, 0 .. L - 1 in each row without segments.
            segment_ids: (B, L) int32; a token sees those of its segment up to itself. None: a row is one segment. The
                mask of eager attention is the ids themselves, which need little memory.
        """
        if segment_ids is not None:
            return hidden_keys(segment_ids) if self.is_fused else segment_ids
        return later_keys(positions, positions[0]) if self.is_fused else None

    def heads(self, x, num_heads):
        batch_size, length, _ = x.shape
        if length == 1:
            return x.reshape((batch_size, num_heads, 1, self.head_dim))
        return permute_rows(x.reshape((batch_size, length, num_heads, self.head_dim)), (0, 2, 1))

    def project(self, x, cos, sin):
        """x (B, L, hidden) -> query (B, H, L, D), key and value (B, K, L, D); ignores cos and sin."""
        query, key = self.heads(self.q_proj(x), self.num_heads), self.heads(self.k_proj(x), self.num_key_value_heads)
        return query, key, self.heads(self.v_proj(x), self.num_key_value_heads)

    def with_cache(self, x, cache, *shared):
        """x (B, L, hidden) of new tokens -> (B, L, hidden); writes their keys and values to the cache."""
        if self.native:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return self.o_proj(self.native(query, key, value, cache.key, cache.value, *shared))
        cos, sin, query_scale, mask, indices, rows = shared
        query, key, value = self.project(x, cos, sin)
        keys, values = cache(key, value, indices, rows)
        return self.attend(scaled(query, query_scale), keys, values, mask)

    def attend(self, query, key, value, mask):
        """query (B, H, L, D), key and value (B, K, S, D) -> (B, L, hidden); mask from `mask` or
        `mask_without_cache`."""
        batch_size, _, length, _ = query.shape
        query = query * self.scale
        if mask is None:
            out = self.causal_core(query, key, value)
        elif mask.ndim == 2:
            out = self.segment_core(query, key, value, mask)
        else:
            out = self.core(query, key, value, mask)
        if length > 1:
            out = permute_rows(out, (0, 2, 1))
        return self.o_proj(out.reshape((batch_size, length, self.num_heads * self.head_dim)))


class RotarySelfAttention(SelfAttention):
    """Self-attention that rotates queries and keys by their positions."""

    has_rotation = True

    def project(self, x, cos, sin):
        """x (B, L, hidden), cos and sin (B, H, L, R) for R of D dimensions, H = K -> query, key (after rotation) and
        value, each (B, H, L, D)."""
        query, key, value = super().project(x, cos, sin)
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value


class GroupedRotarySelfAttention(SelfAttention):
    """Grouped-query attention (arXiv 2305.13245): each key head serves the same number of query heads."""

    has_rotation = True

    def project(self, x, cos, sin):
        """x (B, L, hidden), cos and sin pairs (B, H, L, R) and (B, K, L, R) -> query (B, H, L, D), key and value
        (B, K, L, D)."""
        query, key, value = super().project(x, cos, sin)
        return apply_rotary(query, cos[0], sin[0]), apply_rotary(key, cos[1], sin[1]), value
