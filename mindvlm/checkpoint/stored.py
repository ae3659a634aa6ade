"""Tensors stored in files as plain bytes: their location, and reading one without touching the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.dtypes import block_size, cast_storage, has_nonfinite, storage_dtype
from mindvlm.checkpoint.mapping import map_bytes
from mindvlm.checkpoint.source import TensorInfo, TensorSource
from mindvlm.checkpoint.strided import StridedReader
from mindvlm.core.errors import UserError

_MAX_OPEN_FILES = 16
_MIN_MAPPED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes in a file."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The location of a tensor's values.

    Without `strides` the segments joined are the row-major elements. With `strides` (in elements, one per axis) there
    is one segment, the whole storage, and element (i, j, ...) lies at `first + i*strides[0] + j*strides[1] + ...`.
    """

    info: TensorInfo
    segments: tuple[Segment, ...]
    strides: tuple[int, ...] | None = None
    first: int = 0


@dataclass(frozen=True)
class Contents:
    """The result of a format's reader: tensors in file order, and text entries."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


class NonFiniteError(UserError):
    """A tensor holds NaN or infinity."""


class Checkpoint(TensorSource):
    """A checkpoint on disk, made by `open_checkpoint`; only names, dtypes and shapes are read up front.

    `pread` fills the caller's array, so resident memory grows by the requested elements and never by the whole file.

    Args:
        path: the file or folder, for messages.
        contents: the tensors.
        require_finite: raise NonFiniteError when NaN or infinity is read.
        mapped: return large ranges as read-only arrays over a mapping of the file. A mapping ends with its array and
            keeps no file open. The file must stay as it is; a new file of the same name does no harm.

    Attributes:
        nonfinite: names of tensors in which NaN or infinity was read so far.
    """

    def __init__(self, path: Path, contents: Contents, *, require_finite: bool = False, mapped: bool = False):
        self.path = path
        self._mapped = mapped
        self.nonfinite: set[str] = set()
        self._require_finite = require_finite
        self.metadata = dict(contents.metadata)
        self.tensors = dict(contents.tensors)
        self.infos = {name: tensor.info for name, tensor in self.tensors.items()}
        self._files: dict[Path, int] = {}
        self._strided_reader: StridedReader | None = None

    @property
    def folder(self) -> Path:
        """The folder of the weights, with the config.json that describes them, if any."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, each once, in order of first use."""
        return tuple(dict.fromkeys(s.path for tensor in self.tensors.values() for s in tensor.segments))

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns elements [start, stop) of the flattened tensor.

        Raises:
            UserError: the file cannot be read or ends too early; the message names the tensor.
            NonFiniteError: an element is NaN or infinite, and the checkpoint was opened with `require_finite`.
        """
        tensor = self.tensors[name]
        if tensor.strides is not None:
            result = self._strided(tensor).read_range(start, stop)
        else:
            result = self._read_row_major(tensor, start, stop)
        if has_nonfinite(result, tensor.info.dtype):
            self.nonfinite.add(name)
            if self._require_finite:
                raise _nonfinite_error(tensor, result)
        return result

    def _read_row_major(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        size = block_size(tensor.info.dtype)
        if self._mapped and (result := self._map(tensor, start // size, stop // size)) is not None:
            return result
        result = np.empty((stop - start) // size, dtype=storage_dtype(tensor.info.dtype))
        target = memoryview(result.view(np.uint8))
        skip = start // size * result.itemsize
        for segment in tensor.segments:
            count = min(max(segment.num_bytes - skip, 0), len(target))
            if count:
                self._read_into(tensor.info.name, segment.path, segment.offset + skip, target[:count])
                target = target[count:]
            skip = max(skip - segment.num_bytes, 0)
        return result

    def _map(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray | None:
        """Returns items [start, stop) over a mapping of the file; None where reading is the better or the only way."""
        segment, dtype = tensor.segments[0], storage_dtype(tensor.info.dtype)
        offset, num_bytes = segment.offset + start * dtype.itemsize, (stop - start) * dtype.itemsize
        if len(tensor.segments) > 1 or num_bytes < _MIN_MAPPED_BYTES or offset % dtype.alignment:
            return None
        descriptor = self._descriptor(segment.path)
        if os.fstat(descriptor).st_size < offset + num_bytes:
            return None
        pages = map_bytes(descriptor, offset, num_bytes)
        return None if pages is None else pages.view(dtype)

    def close(self) -> None:
        self._strided_reader = None
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _strided(self, tensor: StoredTensor) -> StridedReader:
        name, segment = tensor.info.name, tensor.segments[0]
        if self._strided_reader is None or self._strided_reader.name != name:
            self._strided_reader = StridedReader(
                tensor.info,
                tensor.strides,
                tensor.first,
                lambda offset, target: self._read_into(name, segment.path, segment.offset + offset, target),
            )
        return self._strided_reader

    def _read_into(self, name: str, path: Path, offset: int, target: memoryview) -> None:
        while len(target):
            try:
                count = os.preadv(self._descriptor(path), [target[: 1 << 30]], offset)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read at tensor {name} ({error.strerror}); check the file and the disk"
                ) from error
            if count == 0:
                raise UserError(
                    f"{path}: became shorter while it was read, at tensor {name}; copy or download it again"
                )
            target, offset = target[count:], offset + count

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._files[path]


def _nonfinite_error(tensor: StoredTensor, data: np.ndarray) -> NonFiniteError:
    name, dtype = tensor.info.name, tensor.info.dtype
    has_nan = bool(np.isnan(cast_storage(data, dtype, "float32")).any())
    if dtype == "float16" and not has_nan:
        remedy = "its values exceeded the range of float16, take the weights in bfloat16 or float32"
    else:
        remedy = "the file is damaged or its training diverged, download it again or take an earlier checkpoint"
    what = "NaN" if has_nan else "infinity"
    return NonFiniteError(f"{tensor.segments[0].path}: tensor {name} holds {what}; {remedy}")
