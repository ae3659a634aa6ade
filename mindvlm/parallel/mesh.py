"""The grid of processes, dp x tp, its section of a job's YAML and its communication groups."""

import functools
from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore.communication import create_group, get_rank, init

from mindvlm.core.errors import UserError
from mindvlm.parallel.launch import is_launched, wait_for_slow_ranks, world_size


@dataclass(kw_only=True)
class ParallelConfig:
    """The section `parallel` of a job's YAML: how dp x tp processes share the work.

    Attributes:
        dp: number of replicas, which train on different samples.
        tp: number of processes that share one replica's weights.
        zero: what the replicas divide: 0 nothing, 1 the optimizer's state, 2 also the gradients (arXiv 1910.02054).
    """

    dp: int = 1
    tp: int = 1
    zero: Literal[0, 1, 2] = 0

    def __post_init__(self):
        if self.dp < 1 or self.tp < 1:
            raise UserError(f"parallel: dp is {self.dp} and tp is {self.tp}; expected at least 1 each")
        if self.zero and self.dp == 1:
            raise UserError(f"parallel.zero is {self.zero} but dp is 1: there is no replica to share with; set zero: 0")

    def check_world_size(self, num_processes: int) -> None:
        """Raises UserError unless dp x tp processes run."""
        expected = self.dp * self.tp
        if num_processes == expected:
            return
        needed = f"{expected} processes" if expected > 1 else "1 process"
        started = f"{num_processes} are running" if num_processes > 1 else "only 1 is running"
        remedy = f"msrun with --worker_num={expected}" if expected > 1 else "without msrun"
        raise UserError(
            f"parallel: dp {self.dp} x tp {self.tp} needs {needed} but {started}; change the section or start {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's position. Neighbouring ranks share a replica: rank = dp_rank * tp + tp_rank.

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
        """Name of the group of processes with the same part of the weights."""
        return f"dp{self.dp}x{self.tp}_{self.tp_rank}"

    @property
    def tp_group(self) -> str:
        """Name of the group of processes that share this replica."""
        return f"tp{self.dp}x{self.tp}_{self.dp_rank}"

    @property
    def dp_ranks(self) -> list[int]:
        return [i * self.tp + self.tp_rank for i in range(self.dp)]

    @property
    def tp_ranks(self) -> list[int]:
        return [self.dp_rank * self.tp + i for i in range(self.tp)]

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0


def init_parallel(config: ParallelConfig) -> Mesh:
    """Connects to the other processes of the job; a single process initializes nothing.

    Call it after the device is set and before expensive work: `msrun` also starts the program as its scheduler, which
    stays in this call until the job is over and then exits.

    Raises:
        UserError: the number of processes is not dp x tp; every process raises it before they connect.
    """
    config.check_world_size(world_size())
    return connect(config)


def init_tensor_parallel(num_processes: int | None) -> Mesh:
    """Connects the processes that share the weights of one model, as `init_parallel` does.

    Args:
        num_processes: the key `tensor_parallel` of a run config; None for all processes of the job.

    Raises:
        UserError: another number of processes runs.
    """
    started = world_size()
    size = started if num_processes is None else num_processes
    if size != started:
        running = f"{started} processes are running" if started > 1 else "only 1 process is running"
        remedy = f"start msrun with --worker_num={size}" if size > 1 else "start without msrun"
        raise UserError(f"tensor_parallel is {size} but {running}; set it to {started}, or {remedy}")
    return connect(ParallelConfig(tp=size))


def init_replicas(num_processes: int | None) -> Mesh:
    """Connects replicas of one model, which answer different questions.

    Args:
        num_processes: that share the weights of a replica, as the key `tensor_parallel` of a run config; None for one.

    Raises:
        UserError: the processes do not fill whole replicas.
    """
    started, size = world_size(), num_processes or 1
    if started % size:
        raise UserError(f"tensor_parallel is {size} but {started} processes run; start a multiple of {size} with msrun")
    return connect(ParallelConfig(dp=started // size, tp=size))


def connect(config: ParallelConfig) -> Mesh:
    """Connects to the other processes of the job, whose number is known to be right."""
    device = ms.get_context("device_target")
    if not is_launched():
        return Mesh(device=device)
    wait_for_slow_ranks()
    init()
    return create_mesh(config, rank=get_rank(), device=device)


def create_mesh(config: ParallelConfig, *, rank: int, device: str) -> Mesh:
    """The mesh of connected processes. Creates its groups of two or more."""
    mesh = Mesh(dp=config.dp, tp=config.tp, rank=rank, device=device)
    if mesh.dp > 1:
        make_group(mesh.dp_group, tuple(mesh.dp_ranks))
    if mesh.tp > 1:
        make_group(mesh.tp_group, tuple(mesh.tp_ranks))
    return mesh


@functools.cache
def make_group(name: str, ranks: tuple[int, ...]) -> None:
    """Creates a communication group, once per process."""
    create_group(name, list(ranks))
