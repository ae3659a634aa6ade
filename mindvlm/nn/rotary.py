"""Rotary position embedding (arXiv 2104.09864) in the half-split form, Qwen's dynamic NTK base and LogN scaling.

B batch, L length, H heads, D head dimension.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import ops

# Qwen-1 tabulates LogN for this many slots; a longer sequence has no defined scale.
MAX_LOGN_LENGTH = 32767


def ntk_alpha(length: int, training_length: int) -> float:
    """Qwen-1's dynamic NTK factor for a prompt of `length` tokens (1 up to the training length, then 3, 7, ...)."""
    return max(2 ** math.ceil(math.log2(length / training_length) + 1) - 1, 1)


def inverse_frequencies(head_dim: int, theta: float, *, alpha: float = 1.0) -> np.ndarray:
    """theta'^(-2i/D) with theta' = theta * alpha^(D/(D-2)), float32 of shape (D/2,)."""
    base = theta * alpha ** (head_dim / (head_dim - 2)) if alpha != 1 else theta
    # float32 throughout, as the reference computes its table
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.power(np.float32(base), exponent)).astype(np.float32)


def rotary_cos_sin(positions, inv_freq, num_heads: int):
    """cos and sin of the angles, each (B, H, L, D) float32, from positions (B, L) int32 and inv_freq (D/2,) float32.

    They are the same for all heads and laid out for each, once for all layers, because broadcasting in every layer
    costs more.
    """
    angles = ops.expand_dims(positions.astype(ms.float32), -1) * inv_freq
    angles = ops.expand_dims(ops.concat((angles, angles), -1), 1)
    batch_size, _, length, head_dim = angles.shape
    shape = (batch_size, num_heads, length, head_dim)
    return ops.broadcast_to(ops.cos(angles), shape), ops.broadcast_to(ops.sin(angles), shape)


def apply_rotary(x, cos, sin):
    """Rotates x (B, H, L, D) by cos, sin (B, H, L, R) in float32 and casts back.

    Where R is below D, the first R dimensions of a head turn and the others pass.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return ops.concat((apply_rotary(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), -1)
    h = x.astype(ms.float32)
    half = rotary_dim // 2
    rotated = ops.concat((-h[..., half:], h[..., :half]), -1)
    return (h * cos + rotated * sin).astype(x.dtype)


def logn_scale(positions, training_length: int):
    """Qwen-1's query scale log_T(p + 1) for slots p >= T = training_length, 1 before; (B, 1, L, 1) float32 from
    positions (B, L)."""
    scale = ops.log(positions.astype(ms.float32) + 1.0) / math.log(training_length)
    return ops.expand_dims(ops.expand_dims(ops.maximum(scale, ops.ones_like(scale)), 1), -1)
