"""Block formats of quantized weights, with ggml's names and bytes: the values of a block share float16 scales.

A block lies along the last axis of a tensor, so that axis is a multiple of the block's size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockFormat:
    """A block of quantized values.

    Attributes:
        size: number of values.
        num_bytes: size of the block in bytes.
        num_scales: number of float16 scales at its beginning.
        widen: returns the values of blocks: (N, num_bytes) uint8 -> (N, size) float32.
    """

    size: int
    num_bytes: int
    num_scales: int
    widen: Callable[[np.ndarray], np.ndarray]


def _scales(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, :2].copy().view("<f2").astype(np.float32)


def _widen_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scales(blocks) * blocks[:, 2:].view(np.int8)


def _widen_q4_0(blocks: np.ndarray) -> np.ndarray:
    values = np.concatenate((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1).view(np.int8)
    return _scales(blocks) * (values - np.int8(8))


def _widen_q4_k(blocks: np.ndarray) -> np.ndarray:
    units = blocks[:, :4].copy().view("<f2").astype(np.float32)
    # 12 bytes hold 6 bits for each of 8 scales and 8 minima: four whole ones, and the rest in halves
    first, second, halves = (blocks[:, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate((first & 63, halves & 15 | first >> 6 << 4), 1)
    minima = np.concatenate((second & 63, halves >> 4 | second >> 6 << 4), 1)
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    values = np.concatenate((pairs & 15, pairs >> 4), 2).reshape(-1, 8, 32)
    widened = (units[:, :1] * scales)[..., None] * values - (units[:, 1:] * minima)[..., None]
    return widened.reshape(len(blocks), 256)


BLOCK_FORMATS = {
    "q8_0": BlockFormat(size=32, num_bytes=34, num_scales=1, widen=_widen_q8_0),
    "q4_0": BlockFormat(size=32, num_bytes=18, num_scales=1, widen=_widen_q4_0),
    "q4_K": BlockFormat(size=256, num_bytes=144, num_scales=2, widen=_widen_q4_k),
}


def blocks_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Returns bytes (..., I / size, num_bytes) uint8 as a storage array (..., I / size)."""
    return np.ascontiguousarray(bits).view(np.dtype((np.void, BLOCK_FORMATS[dtype].num_bytes)))[..., 0]


def bytes_of(data: np.ndarray) -> np.ndarray:
    """Returns a storage array (..., I / size) as bytes (..., I / size, num_bytes) uint8."""
    return np.ascontiguousarray(data)[..., None].view(np.uint8)


def widen_blocks(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the float32 values (..., I) of a storage array (..., I / size)."""
    blocks = BLOCK_FORMATS[dtype]
    values = blocks.widen(bytes_of(data).reshape(-1, blocks.num_bytes))
    return values.reshape(*data.shape[:-1], data.shape[-1] * blocks.size)


def scales_of(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the float16 scales of a storage array, flattened."""
    scales = bytes_of(data)[..., : 2 * BLOCK_FORMATS[dtype].num_scales]
    return np.ascontiguousarray(scales).view("<f2").reshape(-1)
