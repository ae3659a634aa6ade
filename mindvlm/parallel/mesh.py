"""The grid of processes, dp x tp, and its communication groups."""

import functools
from dataclasses import dataclass

import mindspore as ms
from mindspore.communication import create_group, get_rank, init

from mindvlm.parallel import environment
from mindvlm.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this process stands. Neighbouring ranks share a replica: rank = dp_rank * tp + tp_rank.

    Attributes:
        device: "CPU" or "Ascend".
    """

    dp: int = 1
    tp: int = 1
    rank: int = 0
    device: str = "CPU"

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_group(self) -> str:
        """Name of the group of the processes that hold the same part of the weights."""
        return f"dp{self.dp}x{self.tp}_{self.tp_rank}"

    @property
    def tp_group(self) -> str:
        """Name of the group of the processes that share this replica."""
        return f"tp{self.dp}x{self.tp}_{self.dp_rank}"

    @property
    def dp_ranks(self) -> list[int]:
        return [i * self.tp + self.tp_rank for i in range(self.dp)]

    @property
    def tp_ranks(self) -> list[int]:
        return [self.dp_rank * self.tp + i for i in range(self.tp)]

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0


def init_parallel(config: ParallelConfig) -> Mesh:
    """Meets the other processes of the job; alone, nothing is initialised.

    Call it after the device is set and before anything costs time: `msrun` starts the same program once more as its
    scheduler, which stays inside this call until the job is over and then exits.

    Raises:
        UserError: another number of processes runs than the mesh has places (in every process, before they meet).
    """
    config.check_world_size(environment.world_size())
    device = ms.get_context("device_target")
    if not environment.is_launched():
        return Mesh(device=device)
    environment.wait_for_slow_ranks()
    init()
    return create_mesh(config, rank=get_rank(), device=device)


def create_mesh(config: ParallelConfig, *, rank: int, device: str) -> Mesh:
    """The mesh of processes that have met already, with its groups. Groups of one are not made."""
    mesh = Mesh(dp=config.dp, tp=config.tp, rank=rank, device=device)
    if mesh.dp > 1:
        make_group(mesh.dp_group, tuple(mesh.dp_ranks))
    if mesh.tp > 1:
        make_group(mesh.tp_group, tuple(mesh.tp_ranks))
    return mesh


@functools.cache
def make_group(name: str, ranks: tuple[int, ...]) -> None:
    """Makes a communication group, once in the life of the process."""
    create_group(name, list(ranks))
