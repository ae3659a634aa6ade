"""Blocks of quantized weights, see `mindvlm.core.weight_formats.find_block`: the values of a block share scales.

The formats are those of ggml, and q8_c: a float32 scale, then the int8 values of a row. A block lies along the last
axis of a tensor, so that axis is a multiple of the block's size.
"""

import numpy as np

from mindvlm.core.weight_formats import find_block


def _scales(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, :2].copy().view("<f2").astype(np.float32)


def _widen_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scales(blocks) * blocks[:, 2:].view(np.int8)


def _widen_q8_c(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, :4].copy().view("<f4") * blocks[:, 4:].view(np.int8)


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


_WIDEN = {"q8_0": _widen_q8_0, "q8_c": _widen_q8_c, "q4_0": _widen_q4_0, "q4_K": _widen_q4_k}
"""Functions from blocks (N, num_bytes) uint8 to their values (N, size) float32."""
_SCALES = {"q8_0": ("<f2", 1), "q8_c": ("<f4", 1), "q4_0": ("<f2", 1), "q4_K": ("<f2", 2)}
"""Dtype and number of the scales at the beginning of a block."""


def blocks_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Returns bytes (..., I / size, num_bytes) uint8 as a storage array (..., I / size)."""
    return np.ascontiguousarray(bits).view(np.dtype((np.void, find_block(dtype).num_bytes)))[..., 0]


def bytes_of(data: np.ndarray) -> np.ndarray:
    """Returns a storage array (..., I / size) as bytes (..., I / size, num_bytes) uint8."""
    return np.ascontiguousarray(data)[..., None].view(np.uint8)


def widen_blocks(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the float32 values (..., I) of a storage array (..., I / size)."""
    block = find_block(dtype)
    values = _WIDEN[block.format](bytes_of(data).reshape(-1, block.num_bytes))
    return values.reshape(*data.shape[:-1], data.shape[-1] * block.size)


def scales_of(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the scales of a storage array, flattened."""
    kind, count = _SCALES[find_block(dtype).format]
    scales = bytes_of(data)[..., : count * np.dtype(kind).itemsize]
    return np.ascontiguousarray(scales).view(kind).reshape(-1)
