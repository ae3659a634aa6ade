"""Tensors that lie in files as plain bytes: where each one is, and how it is read without touching the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.dtypes import item_size, storage_dtype
from mindvlm.checkpoint.source import TensorInfo, TensorSource
from mindvlm.errors import UserError


@dataclass(frozen=True)
class Segment:
    """A run of bytes in a file."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Where the values of a tensor lie.

    Without `strides` the segments joined are the row-major elements. With `strides` (in elements, one per axis) there
    is one segment, the whole storage, and element (i, j, ...) lies at `first + i*strides[0] + j*strides[1] + ...`.
    """

    info: TensorInfo
    segments: tuple[Segment, ...]
    strides: tuple[int, ...] | None = None
    first: int = 0


@dataclass(frozen=True)
class Contents:
    """What the reader of a file format found: the tensors in file order, and text entries beside them."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


class Checkpoint(TensorSource):
    """A checkpoint on disk. `open_checkpoint` makes one; only names, dtypes and shapes are read up front.

    Reads go through `pread` into the caller's array, so resident memory is what was asked for and never the file.
    """

    def __init__(self, path: Path, contents: Contents):
        self.path = path
        self.metadata = dict(contents.metadata)
        self.tensors = dict(contents.tensors)
        self.infos = {name: tensor.info for name, tensor in self.tensors.items()}
        self._files: dict[Path, int] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, each once, in order of first use."""
        return tuple(dict.fromkeys(s.path for tensor in self.tensors.values() for s in tensor.segments))

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.strides is not None:
            return self._read_strided(tensor, start, stop)
        result = np.empty(stop - start, dtype=storage_dtype(tensor.info.dtype))
        target = memoryview(result.view(np.uint8))
        skip = start * result.itemsize
        for segment in tensor.segments:
            count = min(max(segment.num_bytes - skip, 0), len(target))
            if count:
                self._read_into(segment.path, segment.offset + skip, target[:count])
                target = target[count:]
            skip = max(skip - segment.num_bytes, 0)
        return result

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_into(self, path: Path, offset: int, target: memoryview) -> None:
        while len(target):
            try:
                count = os.preadv(self._descriptor(path), [target[: 1 << 30]], offset)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and the disk") from error
            if count == 0:
                raise UserError(f"{path}: became shorter while it was read; copy or download it again")
            target, offset = target[count:], offset + count

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._files[path]

    def _read_strided(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        """Gather elements [start, stop) of a tensor whose storage order is not row-major, row by row of axis 0."""
        info, segment = tensor.info, tensor.segments[0]
        size = item_size(info.dtype)
        if stop <= start or not info.shape:
            return self._element(tensor, segment, size) if stop > start else np.empty(0, storage_dtype(info.dtype))
        storage = np.memmap(
            segment.path, dtype=storage_dtype(info.dtype), mode="r", offset=segment.offset,
            shape=(segment.num_bytes // size,),
        )  # fmt: skip
        view = np.lib.stride_tricks.as_strided(
            storage[tensor.first :], info.shape, [stride * size for stride in tensor.strides], writeable=False
        )
        row = info.num_elements // info.shape[0]
        first_row, last_row = start // row, -(-stop // row)
        rows = np.array(view[first_row:last_row]).reshape(-1)
        return rows[start - first_row * row : stop - first_row * row]

    def _element(self, tensor: StoredTensor, segment: Segment, size: int) -> np.ndarray:
        result = np.empty(1, dtype=storage_dtype(tensor.info.dtype))
        self._read_into(segment.path, segment.offset + tensor.first * size, memoryview(result.view(np.uint8)))
        return result
