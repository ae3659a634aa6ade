"""Reads tensors that are not stored in row-major order: transposed, sliced or expanded views in torch files.

A range of such a tensor can be spread over its whole storage. It is gathered tile by tile through small reads; the
touched pages of a memory map would count as resident memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mindvlm.checkpoint.dtypes import storage_dtype
from mindvlm.checkpoint.source import TensorInfo

_TILE_BYTES = 16 * 1024 * 1024
_BLOCK_BYTES = 128 * 1024 * 1024


class StridedReader:
    """Reads ranges of one tensor; element (i, j, ...) lies at `first + i*strides[0] + j*strides[1] + ...`.

    Every range of a transposed tensor costs a pass over the storage, so consecutive ranges come from a block of up to
    128 MB that is gathered at once and kept.

    Args:
        info: the tensor.
        strides: in elements, none negative.
        first: element of the storage at which the tensor starts.
        read_into: fills a buffer with the bytes of the storage from an offset.
    """

    def __init__(
        self,
        info: TensorInfo,
        strides: tuple[int, ...],
        first: int,
        read_into: Callable[[int, memoryview], None],
    ):
        self.name = info.name
        self._info = info
        self._strides = strides
        self._first = first
        self._read_into = read_into
        self._dtype = storage_dtype(info.dtype)
        self._block = np.empty(0, self._dtype)
        self._block_start = 0
        self._expected = 0

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Returns elements [start, stop) of the flattened tensor."""
        block_stop = self._block_start + self._block.size
        if not (self._block_start <= start and stop <= block_stop):
            if start != self._expected or (stop - start) * self._dtype.itemsize >= _BLOCK_BYTES:
                self._expected = stop
                return self._gather(start, stop)
            self._block = np.empty(0, self._dtype)
            end = min(max(stop, start + _BLOCK_BYTES // self._dtype.itemsize), self._info.num_elements)
            self._block, self._block_start = self._gather(start, end), start
        self._expected = stop
        return self._block[start - self._block_start : stop - self._block_start].copy()

    def _gather(self, start: int, stop: int) -> np.ndarray:
        result = np.empty(stop - start, self._dtype)
        self._range(self._info.shape, self._strides, self._first, start, stop, result)
        return result

    def _range(
        self, shape: tuple[int, ...], strides: tuple[int, ...], first: int, start: int, stop: int, out: np.ndarray
    ) -> None:
        """Gathers a range as whole rows of axis 0, plus a part of one row before and after them."""
        if start >= stop:
            return
        if not shape:
            self._tile((1,), (0,), first, out)
            return
        row = math.prod(shape[1:])
        first_row, last_row = -(-start // row), stop // row
        if first_row > last_row:
            inner = first + last_row * strides[0]
            self._range(shape[1:], strides[1:], inner, start - last_row * row, stop - last_row * row, out)
            return
        head, tail = first_row * row - start, last_row * row - start
        inner = first + (first_row - 1) * strides[0]
        self._range(shape[1:], strides[1:], inner, row - head, row, out[:head])
        rows = out[head:tail].reshape(last_row - first_row, *shape[1:])
        self._tile(rows.shape, strides, first + first_row * strides[0], rows)
        inner = first + last_row * strides[0]
        self._range(shape[1:], strides[1:], inner, 0, stop - last_row * row, out[tail:])

    def _tile(self, shape: tuple[int, ...], strides: tuple[int, ...], first: int, out: np.ndarray) -> None:
        """Gathers a box, split along its widest axis until the run of storage that holds it is small."""
        if not out.size:
            return
        size = self._dtype.itemsize
        limit = _TILE_BYTES // size
        spans = [(axis - 1) * stride for axis, stride in zip(shape, strides, strict=True)]
        extent = sum(spans) + 1
        if extent <= limit:
            buffer = np.empty(extent, self._dtype)
            self._read_into(first * size, memoryview(buffer.view(np.uint8)))
            out[...] = np.lib.stride_tricks.as_strided(buffer, shape, [stride * size for stride in strides])
            return
        axis = spans.index(max(spans))
        count = max(1, (limit - (extent - spans[axis]) - 1) // strides[axis] + 1)
        count = min(count, (shape[axis] + 1) // 2)
        for begin in range(0, shape[axis], count):
            end = min(begin + count, shape[axis])
            part = (*shape[:axis], end - begin, *shape[axis + 1 :])
            index = (slice(None),) * axis + (slice(begin, end),)
            self._tile(part, strides, first + begin * strides[axis], out[index])
