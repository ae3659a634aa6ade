"""The torch reference as a contender in the training benchmark: eager, float32, torch's own AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mindvlm.convert.reference.vary import ReferenceVary, parameter_groups

if TYPE_CHECKING:
    from mindvlm.tools.benchmark_training_workload import TrainingWorkload


class TorchTrainingPeer:
    """See `mindvlm.tools.benchmark_training_worker.TrainingPeer`."""

    def __init__(self, workload: TrainingWorkload, *, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.workload = workload

    def describe(self) -> str:
        return f"torch {torch.__version__}, {self.model.device}, {torch.get_num_threads()} threads, eager"

    def load(self) -> None:
        workload = self.workload
        self.model = ReferenceVary.from_seed(workload.config, workload.seed).train()
        for tower in (self.model.transformer.vision_tower, self.model.transformer.vision_tower_high):
            tower.requires_grad_(False)
        self.input_ids, self.labels = (
            torch.from_numpy(array).long() for array in (workload.input_ids, workload.labels)
        )
        branches = (torch.from_numpy(branch) for branch in workload.pixels)
        self.images = list(zip(*(branch.split(1) for branch in branches), strict=True))
        groups = parameter_groups(self.model, weight_decay=0.0)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(groups, lr=workload.learning_rate)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def compile(self) -> None:
        """Nothing: every step runs eagerly."""

    def step(self) -> float:
        loss = self.model(self.input_ids, self.images, labels=self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.workload.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
