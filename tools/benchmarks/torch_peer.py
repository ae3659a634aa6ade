"""The torch reference as a contender of the benchmark: eager, one preallocated cache, torch's own AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mindvlm.tools.benchmarks.worker import InferencePeer
from mindvlm.tools.benchmarks.workload import Workload


class Inference(InferencePeer):
    """The reference model and its cache."""

    def __init__(self, workload: Workload, *, dtype: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.workload, self.dtype = workload, getattr(torch, dtype)
        self.prompt_ids = torch.from_numpy(workload.prompt_ids)
        self.pixels = tuple(torch.from_numpy(branch) for branch in workload.pixels)

    def describe(self) -> dict[str, Any]:
        sizes = {name: tensor.nbytes for name, tensor in self.model.named_parameters()}
        read = (size for name, size in sizes.items() if name.startswith(self.workload.decode_prefixes))
        text = f"{described(self.model)}, {str(self.dtype).removeprefix('torch.')}"
        return {"text": text, "stored_bytes": sum(sizes.values()), "decode_bytes": sum(read)}

    def load(self) -> None:
        self.model = self.workload.reference(self.dtype)
        self.cache = self.model.new_cache(1, self.workload.total_length)

    @torch.inference_mode()
    def vision(self) -> None:
        self.features = self.model.encode_images(*self.pixels)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def prompt_logits(self) -> np.ndarray:
        self.cache.reset()
        return self.start(self.prompt_ids, [self.features])

    @torch.inference_mode()
    def start(self, ids: torch.Tensor, features: list[torch.Tensor] | None) -> np.ndarray:
        """Prefills ids (B, L) and chooses the first tokens; returns their logits (B, vocab)."""
        logits = self.model.prefill(self.model.merge(ids, features), self.cache)
        self.next_ids = logits.argmax(-1)
        return logits.float().cpu().numpy()

    @torch.inference_mode()
    def generate(self, num_tokens: int) -> list[int]:
        chosen = []
        for _ in range(num_tokens):
            self.next_ids = self.model.decode_step(self.next_ids, self.cache).argmax(-1)
            chosen.append(int(self.next_ids[0]))
        return chosen

    def start_rows(self, ids: np.ndarray, capacity: int) -> None:
        self.cache = self.model.new_cache(len(ids), capacity)
        self.start(torch.from_numpy(ids), None)

    def continue_rows(self, num_tokens: int) -> None:
        self.generate(num_tokens)


class Training:
    """The reference model and AdamW; implements `TrainingPeer`."""

    def __init__(self, workload: Any, *, dtype: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.workload, self.dtype = workload, getattr(torch, dtype)

    def describe(self) -> str:
        return described(self.model)

    def load(self) -> None:
        workload = self.workload
        self.model, groups = workload.reference(self.dtype)
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
