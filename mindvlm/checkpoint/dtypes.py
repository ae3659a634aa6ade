"""The element types a checkpoint can hold, by one set of names, and exact casts between the floating ones.

numpy has no bfloat16, so its bits travel as uint16 under the dtype name "bfloat16". Everything here works on the
storage arrays: the numpy array that holds the bits of a dtype. A dtype may be a block format, see blocks.py; an item
of its storage array is a block of values along the last axis.
"""

import numpy as np

from mindvlm.checkpoint.blocks import scales_of, widen_blocks
from mindvlm.core.weight_formats import find_block

_STORAGE = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
DTYPES = tuple(_STORAGE)
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
_INFINITY = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
"""Bits of infinity."""


def storage_dtype(dtype: str) -> np.dtype:
    """Returns the little-endian numpy dtype whose bits hold `dtype`: uint16 for "bfloat16", bytes for a block."""
    if block := find_block(dtype):
        return np.dtype((np.void, block.num_bytes))
    return np.dtype(_STORAGE[dtype]).newbyteorder("<")


def item_size(dtype: str) -> int:
    """Returns the bytes of one element, or of one block."""
    return storage_dtype(dtype).itemsize


def block_size(dtype: str) -> int:
    """Returns the number of elements of an item of the storage array: 1, or that of a block."""
    block = find_block(dtype)
    return block.size if block else 1


def is_float(dtype: str) -> bool:
    """Returns whether `dtype` is a floating-point type."""
    return dtype in FLOAT_DTYPES


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widens bfloat16 bits (uint16, any shape) to float32; exact."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 values (any shape) to bfloat16 bits (uint16): to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    # Rounding could carry a NaN's mantissa into infinity or the sign: keep its upper half and make it quiet.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return rounded


def cast_storage(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """Casts a storage array between two dtypes; rounds to nearest even, keeps NaN. Blocks can only be widened.

    Values beyond the target's range become infinity, as in IEEE arithmetic; `overflows` tells whether that happened.
    """
    if source == target:
        return data
    if find_block(source):
        data, source = widen_blocks(data, source), "float32"
    if source == "bfloat16":
        data = bfloat16_to_float32(data)
    if target == "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):
            return float32_to_bfloat16(np.asarray(data, dtype=np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(data).astype(storage_dtype(target), copy=False)


def has_nonfinite(data: np.ndarray, dtype: str) -> bool:
    """Returns whether a storage array holds NaN or infinity. Copies nothing but the scales of blocks."""
    if find_block(dtype):
        data = scales_of(data, dtype)
        dtype = data.dtype.name
    infinity = _INFINITY.get(dtype)
    if infinity is None or not data.size:
        return False
    # Their exponent bits are all ones, so their bits are the largest integers of either sign.
    size = data.itemsize
    sign = 1 << (8 * size - 1)
    return bool(data.view(f"i{size}").max() >= infinity or data.view(f"u{size}").max() >= sign | infinity)


def overflows(source: np.ndarray, source_dtype: str, result: np.ndarray, result_dtype: str) -> bool:
    """Returns whether a cast between floating dtypes turned a finite element into an infinite one."""
    if not (is_float(source_dtype) and is_float(result_dtype)):
        return False
    infinite = _infinite(result, result_dtype)
    return bool(infinite.any()) and bool((infinite & ~_infinite(source, source_dtype)).any())


def _infinite(data: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (data & np.uint16(0x7FFF)) == np.uint16(0x7F80)
    return np.isinf(data)
