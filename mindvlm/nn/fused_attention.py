"""Attention as one NPU operator that never stores all scores (FlashAttention, arXiv 2205.14135).

B batch, L query length, S key length, H heads, D head dimension.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext

FUSED_DTYPES = (ms.float16, ms.bfloat16)
HEAD_DIM_UNIT = 16
MAX_HEAD_DIM = 512


def can_fuse(context: BuildContext, head_dim: int) -> bool:
    """Whether an attention Cell of this context and head dimension uses the fused operator.

    Raises:
        UserError: the context requires fused attention but the dtype or head dimension does not support it.
    """
    if context.attention == "eager":
        return False
    problem = None
    if context.dtype not in FUSED_DTYPES:
        problem = f"the dtype is {str(context.dtype).lower()} and the operator accepts float16 and bfloat16"
    elif head_dim % HEAD_DIM_UNIT or head_dim > MAX_HEAD_DIM:
        problem = (
            f"a head of this model has {head_dim} dimensions and the operator accepts multiples of {HEAD_DIM_UNIT} "
            f"up to {MAX_HEAD_DIM}"
        )
    if problem and context.attention == "fused":
        raise UserError(f"attention is 'fused' but {problem}; set attention: auto or eager")
    return problem is None


class FusedAttention(nn.Cell):
    """softmax(q k^T) v by the operator FlashAttentionScore, which also has a fused gradient."""

    def construct(self, query, key, value, mask=None):
        """Attends in float32 inside the operator.

        Args:
            query: (B, H, L, D) float16 or bfloat16, already scaled.
            key, value: (B, K, S, D) of the same dtype; each of the K heads serves H/K consecutive query heads.
            mask: (B, 1, L, S) bool, True for hidden keys, or None; see `later_keys`.

        Returns:
            (B, H, L, D).

        Raises:
            ValueError: shapes or dtypes do not match; the compiler does not check them.
        """
        batch_size, num_heads, length, head_dim = query.shape
        if key.shape != value.shape or key.shape[0] != batch_size or key.shape[3] != head_dim:
            raise ValueError("FusedAttention: query, key and value differ in batch, heads or head dimension")
        if num_heads % key.shape[1] != 0:
            raise ValueError("FusedAttention: the query heads must be a multiple of the key heads")
        if head_dim % HEAD_DIM_UNIT != 0 or head_dim > MAX_HEAD_DIM:
            raise ValueError("FusedAttention: the head dimension must be a multiple of 16 up to 512")
        if query.dtype not in FUSED_DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
            raise ValueError("FusedAttention: query, key and value must be all float16 or all bfloat16")
        if mask is not None and (mask.dtype != ms.bool_ or mask.shape != (batch_size, 1, length, key.shape[2])):
            raise ValueError("FusedAttention: the mask must be bool of shape (batch, 1, queries, keys)")
        return ops.flash_attention_score(query, key, value, num_heads, attn_mask=mask, input_layout="BNSD")


class PaddedFusedAttention(FusedAttention):
    """`FusedAttention` for any head dimension, padded with zeros to one that the operator accepts."""

    def construct(self, query, key, value, mask=None):
        head_dim = query.shape[-1]
        padded = padded_head_dim(head_dim)
        query, key, value = pad_head_dim(query, padded), pad_head_dim(key, padded), pad_head_dim(value, padded)
        return super().construct(query, key, value, mask)[..., :head_dim]


def later_keys(query_positions, key_positions):
    """Returns the fused operator's causal mask (B, 1, L, S) bool: True where a key's position is after the query's.

    Args:
        query_positions: (B, L) int32.
        key_positions: (S,) int32.
    """
    batch_size, length = query_positions.shape
    return key_positions.reshape((1, 1, 1, -1)) > query_positions.reshape((batch_size, 1, length, 1))


def hidden_keys(segment_ids):
    """Returns the mask (B, 1, L, L) bool: True where a key is after the query or in another segment.

    Args:
        segment_ids: (B, L) int32.
    """
    batch_size, length = segment_ids.shape
    slots = ops.arange(length).astype(ms.int32)
    later = slots.reshape((1, 1, 1, length)) > slots.reshape((1, 1, length, 1))
    others = segment_ids.reshape((batch_size, 1, 1, length)) != segment_ids.reshape((batch_size, 1, length, 1))
    return ops.logical_or(later, others)


def pad_head_dim(x, head_dim: int):
    """Pads x (..., D) with zeros to D = `head_dim`, which leaves q k^T and the first D outputs unchanged."""
    missing = head_dim - x.shape[-1]
    if missing == 0:
        return x
    return ops.concat((x, ops.zeros(x.shape[:-1] + (missing,), x.dtype)), -1)


def padded_head_dim(head_dim: int) -> int:
    """Returns the next larger head dimension that the operator accepts."""
    return -(-head_dim // HEAD_DIM_UNIT) * HEAD_DIM_UNIT
