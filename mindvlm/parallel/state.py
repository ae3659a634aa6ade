"""Weights and optimizer state between a divided job and files, which always hold full tensors.

Every rank calls these functions in the same order with the same names; only the first one gets the full tensors.
"""

from collections.abc import Callable, Iterator

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mindvlm.parallel.buckets import Bucket
from mindvlm.parallel.collectives import SumOver
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.parallel.zero import ShardedAdamW

# Each size is a graph of its own, compiled when it is first needed.
BUFFER_SIZES = (2**10, 2**15, 2**20)


class HostGather:
    """Collects arrays of other ranks on this one, through buffers of fixed size."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        groups = {"dp": (mesh.dp_group, mesh.dp), "tp": (mesh.tp_group, mesh.tp)}
        self.sums = {axis: SumOver(group) for axis, (group, size) in groups.items() if size > 1}

    def over_dp(self, array: np.ndarray) -> list[np.ndarray]:
        """The float32 arrays, equal in shape, of all replicas, in their order."""
        return self.gather(array, "dp", self.mesh.dp_rank, self.mesh.dp)

    def over_tp(self, array: np.ndarray) -> list[np.ndarray]:
        """The float32 arrays, equal in shape, of the tensor-parallel ranks, in their order."""
        return self.gather(array, "tp", self.mesh.tp_rank, self.mesh.tp)

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


def to_array(parameter: Parameter) -> np.ndarray:
    """The values as float32 (numpy has no bfloat16)."""
    return (parameter if parameter.dtype == ms.float32 else parameter.astype(ms.float32)).asnumpy()


def full_weights(
    parameters: list[Parameter], specs: dict[str, ShardSpec], host: HostGather
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and full float32 array of each parameter, one at a time."""
    for parameter in parameters:
        yield parameter.name, join_parts(parameter.name, to_array(parameter), specs, host)


def join_parts(name: str, part: np.ndarray, specs: dict[str, ShardSpec], host: HostGather) -> np.ndarray:
    spec = specs.get(name)
    return part if spec is None else spec.join(host.over_tp(part))


def full_optimizer_state(
    optimizer: ShardedAdamW, specs: dict[str, ShardSpec], host: HostGather
) -> Iterator[tuple[str, np.ndarray]]:
    """`moment1.<parameter>`, `moment2.<parameter>` (and `master.<parameter>` where there is one), full, one at a time.

    The names and values that an undivided AdamW has, so that a state can be read on any mesh.
    """
    for kind, chunks in optimizer_kinds(optimizer).items():
        for bucket, chunk in zip(optimizer.buckets, chunks, strict=True):
            if kind == "master" and not has_master(bucket):
                continue
            flat = np.concatenate(host.over_dp(chunk.asnumpy()))
            for index, part in zip(bucket.indices, split_flat(bucket, flat), strict=True):
                name = optimizer.parameters[index].name
                yield f"{kind}.{name}", join_parts(name, part, specs, host)


def load_optimizer_state(
    optimizer: ShardedAdamW, specs: dict[str, ShardSpec], mesh: Mesh, read: Callable[[str], np.ndarray]
) -> None:
    """Fills the chunks of this replica. `read` gives the full array of a name of `full_optimizer_state`."""
    for kind, chunks in optimizer_kinds(optimizer).items():
        for bucket, chunk in zip(optimizer.buckets, chunks, strict=True):
            if kind == "master" and not has_master(bucket):
                continue
            parts = []
            for index in bucket.indices:
                name = optimizer.parameters[index].name
                full = read(f"{kind}.{name}")
                parts.append(specs[name].take(full) if name in specs else full)
            chunk.set_data(Tensor(own_chunk(bucket, parts, mesh)))


def fill_masters(optimizer: ShardedAdamW, mesh: Mesh) -> None:
    """Makes the float32 master copies of 16-bit parameters, once these are filled."""
    for bucket, master in zip(optimizer.buckets, optimizer.master, strict=True):
        if has_master(bucket):
            parts = [to_array(optimizer.parameters[i]) for i in bucket.indices]
            master.set_data(Tensor(own_chunk(bucket, parts, mesh)))


def optimizer_kinds(optimizer: ShardedAdamW) -> dict[str, tuple[Parameter, ...]]:
    return {"moment1": optimizer.moment1, "moment2": optimizer.moment2, "master": optimizer.master}


def has_master(bucket: Bucket) -> bool:
    return any(dtype != ms.float32 for dtype in bucket.dtypes)


def split_flat(bucket: Bucket, flat: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(bucket.sizes)
    return [
        flat[end - size : end].reshape(shape)
        for end, size, shape in zip(ends, bucket.sizes, bucket.shapes, strict=True)
    ]


def own_chunk(bucket: Bucket, parts: list[np.ndarray], mesh: Mesh) -> np.ndarray:
    flat = np.zeros(bucket.chunk_size * mesh.dp, np.float32)
    joined = np.concatenate([part.reshape(-1) for part in parts])
    flat[: joined.size] = joined
    return flat.reshape((mesh.dp, bucket.chunk_size))[mesh.dp_rank].copy()
