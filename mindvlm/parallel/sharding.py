"""The part of a full tensor that a rank holds."""

import math
from dataclasses import dataclass

import numpy as np

from mindvlm.checkpoint.source import CHUNK_BYTES, TensorSource
from mindvlm.core.errors import UserError


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
                f"parallel.tp is {self.count} but {name} is {size} long on axis {self.axis}"
                f"{f' ({self.num_sections} sections)' if self.num_sections > 1 else ''}; choose a tp that divides it"
            )


def read_shard(source: TensorSource, name: str, spec: ShardSpec | None) -> np.ndarray:
    """Reads one rank's part of a stored tensor, in its storage dtype; the whole tensor without a spec.

    Reads only the part along the first axis, and blocks of rows for another axis: never the whole tensor at once.
    """
    info = source.infos[name]
    if spec is None:
        return source.read(name).data
    spec.check(name, info.shape[spec.axis])
    if spec.axis == 0:
        row_size = math.prod(info.shape[1:])
        parts = [source.read_range(name, a * row_size, b * row_size) for a, b in spec.ranges(info.shape[0])]
        return np.concatenate(parts).reshape((-1, *info.shape[1:]))
    outer = math.prod(info.shape[: spec.axis])
    row_shape = info.shape[spec.axis :]
    row_size = math.prod(row_shape)
    num_rows = max(1, CHUNK_BYTES // (row_size * 4))
    blocks = []
    in_row = ShardSpec(axis=1, index=spec.index, count=spec.count, num_sections=spec.num_sections)
    for start in range(0, outer, num_rows):
        stop = min(start + num_rows, outer)
        rows = source.read_range(name, start * row_size, stop * row_size).reshape((stop - start, *row_shape))
        blocks.append(in_row.take(rows))
    return np.concatenate(blocks).reshape((*info.shape[: spec.axis], -1, *info.shape[spec.axis + 1 :]))
