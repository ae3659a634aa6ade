"""What the processes of a job tell each other outside of the graphs."""

import json
from typing import Any

import numpy as np

from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.state import HostGather


class Ranks:
    """The processes of a mesh. All of them call the same methods in the same order.

    Args:
        mesh: of this process.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.host = HostGather(mesh)

    def of_replicas(self, value: Any) -> list[Any]:
        """What JSON can hold, of all replicas in their order."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.float32)
        sizes = [int(size[0]) for size in self.host.over_dp(np.array([data.size], np.float32))]
        padded = np.zeros(max(sizes), np.float32)
        padded[: data.size] = data
        rows = self.host.over_dp(padded)
        texts = [row[:size].astype(np.uint8).tobytes() for row, size in zip(rows, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def from_first(self, value: Any) -> Any:
        """What JSON can hold, of the first process; the others' value is of no matter."""
        first = self.of_replicas(value)[0]
        if self.mesh.tp == 1:
            return first
        data = np.frombuffer(json.dumps(first).encode(), np.uint8).astype(np.float32)
        size = int(self.host.over_tp(np.array([data.size], np.float32))[0][0])
        padded = np.zeros(size, np.float32)
        padded[: data.size] = data[:size]
        return json.loads(self.host.over_tp(padded)[0].astype(np.uint8).tobytes())
