"""The interface of named tensors in a file, in memory or behind conversion rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.dtypes import (
    DTYPES,
    block_size,
    cast_storage,
    is_float,
    item_size,
    overflows,
    storage_dtype,
)
from mindvlm.core.errors import UserError

# Small enough to stay in the CPU cache between reading and writing, and for the allocator to reuse.
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype and shape of a tensor, without its values.

    The dtype is a name of `dtypes.DTYPES` or that `find_block` knows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements // block_size(self.dtype) * item_size(self.dtype)


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the bits of its dtype: `data` has `shape` and numpy dtype `storage_dtype(dtype)`.

    For "bfloat16" the data are uint16 bits, for a block format blocks (..., I / size of a block), for all other dtypes
    the values themselves.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def from_array(cls, array: np.ndarray, dtype: str | None = None) -> RawTensor:
        """Wraps a numpy array; pass `dtype="bfloat16"` when it holds the uint16 bits of bfloat16 values."""
        array = np.asarray(array)
        name = dtype or array.dtype.name
        if name not in DTYPES or array.dtype.newbyteorder("<") != storage_dtype(name):
            raise UserError(f"numpy dtype {array.dtype} cannot be stored as {name!r}; use one of {', '.join(DTYPES)}")
        return cls(name, array.shape, array)

    def cast(self, dtype: str) -> RawTensor:
        """Returns the tensor in another dtype, rounded to nearest even; itself if the dtype is the same."""
        if dtype == self.dtype:
            return self
        return RawTensor(dtype, self.shape, cast_storage(self.data, self.dtype, dtype))

    def to_float32(self) -> np.ndarray:
        """Returns the values as a float32 array of `shape`."""
        return self.cast("float32").data


def storage_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the storage array of a tensor."""
    size = block_size(dtype)
    return shape if size == 1 else (*shape[:-1], shape[-1] // size)


class TensorSource(ABC):
    """Named tensors that are read one at a time; a read holds no more than the requested elements.

    `infos` lists them in a stable order, and `path` names their origin in messages. A source is a context manager.
    """

    path: Path
    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns elements [start, stop) of the flattened (row-major) tensor, a 1-D storage array.

        Of a block format, these are whole blocks.
        """

    @property
    def recipe(self) -> str:
        """Identifies how the tensors are computed from those in the files; empty if they are stored as they are."""
        return ""

    def read(self, name: str) -> RawTensor:
        """Returns one whole tensor."""
        info = self.infos[name]
        data = self.read_range(name, 0, info.num_elements)
        return RawTensor(info.dtype, info.shape, data.reshape(storage_shape(info.dtype, info.shape)))

    def chunks(self, name: str, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yields the flattened tensor in order as 1-D storage arrays of at most `max_bytes`."""
        info = self.infos[name]
        step = max(1, max_bytes // item_size(info.dtype)) * block_size(info.dtype)
        for start in range(0, info.num_elements, step):
            yield self.read_range(name, start, min(start + step, info.num_elements))

    def close(self) -> None:  # noqa: B027 (only sources with files override it)
        """Releases open files."""

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class MemorySource(TensorSource):
    """Tensors held in memory, in the order of the mapping: numpy arrays, or `RawTensor` where dtypes need it."""

    def __init__(self, tensors: Mapping[str, np.ndarray | RawTensor], path: str | Path = "<memory>"):
        self.path = Path(path)
        self._tensors = {
            name: value if isinstance(value, RawTensor) else RawTensor.from_array(value)
            for name, value in tensors.items()
        }
        self.infos = {name: TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors[name]
        size = block_size(tensor.dtype)
        return tensor.data.reshape(-1)[start // size : stop // size]


class SourceView(TensorSource):
    """Another source, which it closes; subclasses change its tensors or the values that are read."""

    def __init__(self, source: TensorSource, infos: Mapping[str, TensorInfo] | None = None):
        self.path = source.path
        self.infos = source.infos if infos is None else infos
        self._source = source

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read_range(name, start, stop)

    def close(self) -> None:
        self._source.close()


class CastSource(SourceView):
    """Another source with its floating-point tensors cast to one dtype; integers and bools stay unchanged.

    Raises:
        UserError: while reading, if a finite value does not fit into the dtype.
    """

    def __init__(self, source: TensorSource, dtype: str):
        infos = {
            name: TensorInfo(name, dtype, info.shape) if is_float(info.dtype) else info
            for name, info in source.infos.items()
        }
        super().__init__(source, infos)

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        source_dtype, dtype = self._source.infos[name].dtype, self.infos[name].dtype
        data = super().read_range(name, start, stop)
        result = cast_storage(data, source_dtype, dtype)
        if result is not data and overflows(data, source_dtype, result, dtype):
            raise UserError(
                f"{self.path}: tensor {name} holds values beyond the range of {dtype}; "
                f"choose bfloat16 or float32, or keep the dtype"
            )
        return result
