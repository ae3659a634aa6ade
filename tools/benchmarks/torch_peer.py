"""The torch reference as a contender of the benchmark: eager, float32, one preallocated cache, torch's own AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mindvlm.tools.benchmarks.worker import InferencePeer
from mindvlm.tools.benchmarks.workload import Workload


class Inference(InferencePeer):
    """The reference model and its cache."""

    def __init__(self, workload: Workload, *, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.workload = workload
        self.prompt_ids = torch.from_numpy(workload.prompt_ids)
        self.pixels = tuple(torch.from_numpy(branch) for branch in workload.pixels)

    def describe(self) -> str:
        return described(self.model)

    def load(self) -> None:
        self.model = self.workload.reference()
        self.cache = self.model.new_cache(1, self.workload.total_length)

    @torch.inference_mode()
    def vision(self) -> None:
        self.features = self.model.encode_images(*self.pixels)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def prompt_logits(self) -> np.ndarray:
        self.cache.reset()
        logits = self.model.prefill(self.model.merge(self.prompt_ids, [self.features]), self.cache)
        self.next_ids = logits.argmax(-1)
        return logits.cpu().numpy()

    @torch.inference_mode()
    def generate(self, num_tokens: int) -> list[int]:
        chosen = []
        for _ in range(num_tokens):
            self.next_ids = self.model.decode_step(self.next_ids, self.cache).argmax(-1)
            chosen.append(int(self.next_ids))
        return chosen


class Training:
    """The reference model and AdamW; implements `TrainingPeer`."""

    def __init__(self, workload: Any, *, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.workload = workload

    def describe(self) -> str:
        return described(self.model)

    def load(self) -> None:
        workload = self.workload
        self.model, groups = workload.reference()
        self.input_ids, self.labels = (
            torch.from_numpy(array).long() for array in (workload.input_ids, workload.labels)
        )
        branches = (torch.from_numpy(branch) for branch in workload.pixels)
        self.images = list(zip(*(branch.split(1) for branch in branches), strict=True))
        self.optimizer = torch.optim.AdamW(groups, lr=workload.learning_rate)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def compile(self) -> None:
        """Does nothing: every step runs eagerly."""

    def step(self) -> float:
        loss = self.model(self.input_ids, self.images, labels=self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.workload.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def described(model: torch.nn.Module) -> str:
    return f"torch {torch.__version__}, {model.device}, {torch.get_num_threads()} threads, eager"
