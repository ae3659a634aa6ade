"""Weights and optimizer state of a divided job, gathered for and read from files of full tensors.

Every rank calls these functions in the same order with the same names; only the first rank receives the full tensors.
"""

from collections.abc import Callable, Iterator

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mindvlm.parallel.buckets import Bucket
from mindvlm.parallel.host import HostGather
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.parallel.zero import ShardedAdamW


def to_array(parameter: Parameter) -> np.ndarray:
    """The values as float32; numpy has no bfloat16."""
    return (parameter if parameter.dtype == ms.float32 else parameter.astype(ms.float32)).asnumpy()


def join_parts(name: str, part: np.ndarray, specs: dict[str, ShardSpec], host: HostGather) -> np.ndarray:
    spec = specs.get(name)
    return part if spec is None else spec.join(host.over_tp(part))


def full_optimizer_state(
    optimizer: ShardedAdamW, specs: dict[str, ShardSpec], host: HostGather
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the full `moment1.<parameter>`, `moment2.<parameter>` and, if any, `master.<parameter>`, one at a time.

    Names and values are those of an undivided AdamW, so that any mesh can read the state.
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
    """Fills this replica's chunks. `read` returns the full array for a name of `full_optimizer_state`."""
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
    """Fills the float32 master copies of 16-bit parameters, which must be filled."""
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
