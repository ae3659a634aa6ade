"""The section `parallel` of a job's YAML."""

from dataclasses import dataclass
from typing import Literal

from mindvlm.core.errors import UserError


@dataclass(kw_only=True)
class ParallelConfig:
    """How the processes share the work; the number of processes is dp x tp.

    Attributes:
        dp: replicas that train on different samples.
        tp: processes that share one replica's weights.
        zero: what the replicas share: 0 nothing, 1 the optimizer's state, 2 also the gradients (arXiv 1910.02054).
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
        """Raises UserError unless as many processes run as the mesh has places."""
        expected = self.dp * self.tp
        if num_processes == expected:
            return
        needed = f"{expected} processes" if expected > 1 else "1 process"
        started = f"{num_processes} run" if num_processes > 1 else "only this one runs"
        remedy = f"msrun with --worker_num={expected}" if expected > 1 else "without msrun"
        raise UserError(
            f"parallel: dp {self.dp} x tp {self.tp} needs {needed} but {started}; change the section or start {remedy}"
        )
