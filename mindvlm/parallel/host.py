"""Exchanges arrays and JSON values between the processes of a job, outside of compiled graphs."""

import json
from typing import Any

import numpy as np
from mindspore import Tensor

from mindvlm.parallel.collectives import SumOver
from mindvlm.parallel.mesh import Mesh

# Each size is one graph, compiled on first use.
BUFFER_SIZES = (2**10, 2**15, 2**20)


class HostGather:
    """Gathers arrays from other ranks, through buffers of fixed size."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        groups = {"dp": (mesh.dp_group, mesh.dp), "tp": (mesh.tp_group, mesh.tp)}
        self.sums = {axis: SumOver(group) for axis, (group, size) in groups.items() if size > 1}

    def over_dp(self, array: np.ndarray) -> list[np.ndarray]:
        """The float32 arrays of all replicas, equal in shape, in rank order."""
        return self.gather(array, "dp", self.mesh.dp_rank, self.mesh.dp)

    def over_tp(self, array: np.ndarray) -> list[np.ndarray]:
        """The float32 arrays of the tensor-parallel ranks, equal in shape, in rank order."""
        return self.gather(array, "tp", self.mesh.tp_rank, self.mesh.tp)

    def first(self, array: np.ndarray) -> np.ndarray:
        """The array of the first of the tensor-parallel ranks, whose values must be exact in float32."""
        return array if self.mesh.tp == 1 else self.over_tp(array)[0].astype(array.dtype)

    def wait(self) -> None:
        """Returns when all tensor-parallel ranks have called it."""
        self.over_tp(np.zeros(1, np.float32))

    def gather(self, array: np.ndarray, axis: str, place: int, size: int) -> list[np.ndarray]:
        if size == 1:
            return [array]
        rows = np.zeros((size, array.size), np.float32)
        rows[place] = array.reshape(-1)
        flat = self.sum(rows.reshape(-1), self.sums[axis])
        return list(flat.reshape((size, *array.shape)))

    def sum(self, flat: np.ndarray, over_ranks: SumOver) -> np.ndarray:
        start = 0
        while start < flat.size:
            left = flat.size - start
            buffer = np.zeros(next((size for size in BUFFER_SIZES if size >= left), BUFFER_SIZES[-1]), np.float32)
            count = min(left, buffer.size)
            buffer[:count] = flat[start : start + count]
            flat[start : start + count] = over_ranks(Tensor(buffer)).asnumpy()[:count]
            start += count
        return flat


class Ranks:
    """The processes of a mesh. All processes call the same methods in the same order.

    Args:
        mesh: the mesh of this process.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.host = HostGather(mesh)

    def of_replicas(self, value: Any) -> list[Any]:
        """Returns the JSON values of all replicas, in order."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.float32)
        sizes = [int(size[0]) for size in self.host.over_dp(np.array([data.size], np.float32))]
        padded = np.zeros(max(sizes), np.float32)
        padded[: data.size] = data
        rows = self.host.over_dp(padded)
        texts = [row[:size].astype(np.uint8).tobytes() for row, size in zip(rows, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def from_first(self, value: Any) -> Any:
        """Returns the JSON value of the first process; values from other processes are ignored."""
        first = self.of_replicas(value)[0]
        if self.mesh.tp == 1:
            return first
        data = np.frombuffer(json.dumps(first).encode(), np.uint8).astype(np.float32)
        size = int(self.host.over_tp(np.array([data.size], np.float32))[0][0])
        padded = np.zeros(size, np.float32)
        padded[: data.size] = data[:size]
        return json.loads(self.host.over_tp(padded)[0].astype(np.uint8).tobytes())
