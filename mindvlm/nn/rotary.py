"""Rotary position embedding (arXiv 2104.09864) in the half-split form, Qwen's dynamic NTK base and LogN scaling.

B batch, L length, H heads, D head dimension, R rotated dimensions.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import ops

from mindvlm.nn.config import DecoderConfig, RopeScaling

# Qwen-1 tabulates LogN for this many positions; the scale of a longer sequence is undefined.
MAX_LOGN_LENGTH = 32767


def ntk_alpha(length: int, training_length: int) -> float:
    """Returns Qwen-1's dynamic NTK factor for a prompt: 1 up to the training length, then 3, 7, ..."""
    return max(2 ** math.ceil(math.log2(length / training_length) + 1) - 1, 1)


def decoder_frequencies(config: DecoderConfig, alpha: float = 1.0) -> np.ndarray:
    """Returns the rotary frequencies of a decoder, (R/2,) float32, with the base changed by an NTK factor."""
    return inverse_frequencies(config.rotary_dim, config.rope_theta, alpha=alpha, scaling=config.rope_scaling)


def inverse_frequencies(
    head_dim: int, theta: float, *, alpha: float = 1.0, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Returns theta'^(-2i/D) with theta' = theta * alpha^(D/(D-2)), then scaled; (D/2,) float32."""
    base = theta * alpha ** (head_dim / (head_dim - 2)) if alpha != 1 else theta
    # float32 throughout, as the reference computes its table
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(base), exponent)).astype(np.float32)
    return frequencies if scaling is None else scaled_frequencies(frequencies, scaling)


def scaled_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Applies the scaling of Llama-3 to frequencies (D/2,) float32; see `RopeScaling`.

    Reproduces `_compute_llama3_parameters` of transformers.
    """
    length = scaling.original_max_position_embeddings
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / frequencies
    stretched = frequencies / np.float32(scaling.factor)
    smooth = (np.float32(length) / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched + smooth * frequencies
    return np.where(
        wavelengths < length / high, frequencies, np.where(wavelengths > length / low, stretched, between)
    ).astype(np.float32)


def rotary_cos_sin(positions, inv_freq, num_heads: int):
    """Returns cos and sin of the angles, each (B, H, L, D) float32.

    They are equal for all heads but stored for each, because broadcasting in every layer costs more.

    Args:
        positions: (B, L) int32.
        inv_freq: float32, (D/2,) for all rows or (B, 1, D/2).
        num_heads: H.
    """
    angles = ops.expand_dims(positions.astype(ms.float32), -1) * inv_freq
    angles = ops.expand_dims(ops.concat((angles, angles), -1), 1)
    batch_size, _, length, head_dim = angles.shape
    shape = (batch_size, num_heads, length, head_dim)
    return ops.broadcast_to(ops.cos(angles), shape), ops.broadcast_to(ops.sin(angles), shape)


def apply_rotary(x, cos, sin):
    """Rotates x (B, H, L, D) by cos, sin (B, H, L, R) in float32 and casts back.

    If R < D, only the first R dimensions of a head are rotated.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return ops.concat((apply_rotary(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), -1)
    h = x.astype(ms.float32)
    half = rotary_dim // 2
    rotated = ops.concat((-h[..., half:], h[..., :half]), -1)
    return (h * cos + rotated * sin).astype(x.dtype)


def logn_scale(positions, training_length: int):
    """Returns Qwen-1's query scale max(1, log_T(p + 1)) with T the training length.

    positions (B, L) int32 -> (B, 1, L, 1) float32.
    """
    scale = ops.log(positions.astype(ms.float32) + 1.0) / math.log(training_length)
    return ops.expand_dims(ops.expand_dims(ops.maximum(scale, ops.ones_like(scale)), 1), -1)
