"""Attention in one operator of the NPU, without a tensor of all scores (FlashAttention, arXiv 2205.14135).

B batch, L query length, S key length, H heads, D head dimension.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.core import runtime
from mindvlm.core.errors import UserError

FUSED_DTYPES = (ms.float16, ms.bfloat16)
HEAD_DIM_UNIT = 16
MAX_HEAD_DIM = 512


def can_fuse(dtype, head_dim: int) -> bool:
    """Whether an attention that is being built takes the fused operator, as `runtime.start` settled it.

    Raises:
        UserError: the config asks for fused attention and this one cannot be fused.
    """
    choice = runtime.attention()
    if choice == "eager":
        return False
    problem = None
    if dtype not in FUSED_DTYPES:
        problem = f"the dtype is {str(dtype).lower()} and the operator takes float16 and bfloat16"
    elif head_dim % HEAD_DIM_UNIT or head_dim > MAX_HEAD_DIM:
        problem = (
            f"a head of this model has {head_dim} dimensions and the operator takes multiples of {HEAD_DIM_UNIT} up to "
            f"{MAX_HEAD_DIM}"
        )
    if problem and choice == "fused":
        raise UserError(f"attention is 'fused' but {problem}; set attention: auto or eager")
    return problem is None


class FusedAttention(nn.Cell):
    """softmax(q k^T) v by FlashAttentionScore, whose gradient is fused as well."""

    def construct(self, query, key, value, mask=None):
        """Attends in float32 inside the operator.

        Args:
            query: (B, H, L, D) float16 or bfloat16, scaled already.
            key, value: (B, K, S, D) of the same dtype; each of the K heads serves H/K query heads in a row.
            mask: (B, 1, L, S) bool, True where a key is not seen, or None; see `later_keys`.

        Returns:
            (B, H, L, D).

        Raises:
            ValueError: shapes or dtypes do not fit. The compiler's own inference of the operator lets them pass.
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
    """The same for heads of any dimension: zeros fill them up to one that the operator takes."""

    def construct(self, query, key, value, mask=None):
        head_dim = query.shape[-1]
        padded = padded_head_dim(head_dim)
        query, key, value = pad_head_dim(query, padded), pad_head_dim(key, padded), pad_head_dim(value, padded)
        return super().construct(query, key, value, mask)[..., :head_dim]


def later_keys(query_positions, key_positions):
    """The fused operator's causal mask (B, 1, L, S) bool: True where a key's position is after the query's.

    Args:
        query_positions: (B, L) int32.
        key_positions: (S,) int32.
    """
    batch_size, length = query_positions.shape
    return key_positions.reshape((1, 1, 1, -1)) > query_positions.reshape((batch_size, 1, length, 1))


def pad_head_dim(x, head_dim: int):
    """x (..., D) with zeros behind its last axis up to `head_dim`; they change neither q k^T nor the columns of v."""
    missing = head_dim - x.shape[-1]
    if missing == 0:
        return x
    return ops.concat((x, ops.zeros(x.shape[:-1] + (missing,), x.dtype)), -1)


def padded_head_dim(head_dim: int) -> int:
    """The next size that the operator takes."""
    return -(-head_dim // HEAD_DIM_UNIT) * HEAD_DIM_UNIT
