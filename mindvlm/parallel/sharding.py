"""The part of a full tensor that a rank holds."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mindvlm.checkpoint.dtypes import storage_dtype
from mindvlm.checkpoint.source import CHUNK_BYTES, SourceView, TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import find_block


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Part `index` of `count` equal parts along `axis`.

    With `num_sections` the axis consists of that many equal sections (query, key and value in one matrix), and every
    rank has its part of each section.
    """

    axis: int
    index: int
    count: int
    num_sections: int = 1

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full tensor, from that of the part."""
        return tuple(size * self.count if axis == self.axis else size for axis, size in enumerate(shape))

    def part_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of a full tensor. Raises UserError if it cannot be divided."""
        self.check(name, shape[self.axis])
        return tuple(size // self.count if axis == self.axis else size for axis, size in enumerate(shape))

    def ranges(self, size: int) -> list[tuple[int, int]]:
        """Index ranges [start, stop) of the part along the axis of the full tensor, which is `size` long."""
        section = size // self.num_sections
        part = section // self.count
        starts = [i * section + self.index * part for i in range(self.num_sections)]
        return [(start, start + part) for start in starts]

    def take(self, full: np.ndarray) -> np.ndarray:
        """The part of a full array."""
        ranges = self.ranges(full.shape[self.axis])
        slices = [(slice(None),) * self.axis + (slice(start, stop),) for start, stop in ranges]
        return np.concatenate([full[s] for s in slices], axis=self.axis)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The full array from the parts of all ranks, in rank order."""
        sections = [np.split(part, self.num_sections, axis=self.axis) for part in parts]
        ordered = [sections[rank][i] for i in range(self.num_sections) for rank in range(self.count)]
        return np.concatenate(ordered, axis=self.axis)

    def check(self, name: str, size: int) -> None:
        """Raises UserError unless the axis, of length `size`, can be divided."""
        if size % (self.count * self.num_sections):
            raise UserError(
                f"{name} is {size} long on axis {self.axis}"
                f"{f' ({self.num_sections} sections)' if self.num_sections > 1 else ''}, which {self.count} "
                "tensor-parallel processes cannot share; choose a number that divides it"
            )


def shard_infos(infos: Iterable[TensorInfo], specs: Mapping[str, ShardSpec]) -> list[TensorInfo]:
    """Returns the tensors with the shapes of a rank's parts.

    Raises:
        UserError: a tensor cannot be divided.
    """
    return [
        TensorInfo(info.name, info.dtype, specs[info.name].part_shape(info.name, info.shape))
        if info.name in specs
        else info
        for info in infos
    ]


class ShardedSource(SourceView):
    """One rank's parts of the tensors of another source, which it closes; reads no other parts of divided tensors.

    Args:
        source: the full tensors.
        specs: the parts of divided tensors; other tensors stay whole.
    """

    def __init__(self, source: TensorSource, specs: Mapping[str, ShardSpec]):
        super().__init__(source, {info.name: info for info in shard_infos(source.infos.values(), specs)})
        self._specs = specs

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._specs:
            return super().read_range(name, start, stop)
        return read_part(self._source, name, self._specs[name], start, stop)


def read_shard(source: TensorSource, name: str, spec: ShardSpec | None) -> np.ndarray:
    """Returns one rank's part of a stored tensor in its storage dtype; the whole tensor without a spec."""
    if spec is None:
        return source.read(name).data
    shape = spec.part_shape(name, source.infos[name].shape)
    return read_part(source, name, spec, 0, math.prod(shape)).reshape(shape)


def read_part(source: TensorSource, name: str, spec: ShardSpec, start: int, stop: int) -> np.ndarray:
    """Returns elements [start, stop) of the flattened part, a 1-D storage array.

    Reads only the part along the first axis, and blocks of whole rows for another axis: never the whole tensor at once.

    Raises:
        UserError: the tensor is quantized and its rows are divided.
    """
    info = source.infos[name]
    shape = info.shape
    if find_block(info.dtype) and spec.axis:
        raise UserError(
            f"{source.path}: {name} is {info.dtype}, whose rows {spec.count} tensor-parallel processes cannot divide; "
            "give the weights that it was made from"
        )
    if start == stop:
        return np.empty(0, storage_dtype(info.dtype))
    pieces = []
    if spec.axis == 0:
        row_size, end = math.prod(shape[1:]), 0
        for first, last in spec.ranges(shape[0]):
            begin, end = end, end + (last - first) * row_size
            at, until = (max(begin, min(element, end)) - begin + first * row_size for element in (start, stop))
            if at < until:
                pieces.append(source.read_range(name, at, until))
    else:
        inner = shape[spec.axis :]
        row_size, part_size = math.prod(inner), math.prod(inner) // spec.count
        in_row = dataclasses.replace(spec, axis=1)
        step = max(1, CHUNK_BYTES // (row_size * 4))
        first_row, last_row = start // part_size, -(-stop // part_size)
        for row in range(first_row, last_row, step):
            num_rows = min(step, last_row - row)
            rows = source.read_range(name, row * row_size, (row + num_rows) * row_size)
            pieces.append(in_row.take(rows.reshape((num_rows, *inner))).reshape(-1))
        offset = first_row * part_size
        start, stop = start - offset, stop - offset
        return np.concatenate(pieces)[start:stop]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
