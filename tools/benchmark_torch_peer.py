"""The torch reference as a contender in `tools/benchmark.py`: eager, float32, one preallocated cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mindvlm.convert.reference.tinyllava import ReferenceTinyLlava
from mindvlm.convert.reference.vary import ReferenceVary

if TYPE_CHECKING:
    from mindvlm.tools.benchmark_workload import Workload

MODELS = {"vary": ReferenceVary, "tinyllava": ReferenceTinyLlava}


class TorchPeer:
    """See `mindvlm.tools.benchmark_stages.Peer`.

    Args:
        workload: sizes, seed of the random weights, prompt and pixels.
        num_threads: for torch's operators.
    """

    def __init__(self, workload: Workload, *, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.workload = workload
        self.prompt_ids = torch.from_numpy(workload.prompt_ids)
        self.pixels = tuple(torch.from_numpy(branch) for branch in workload.pixels)

    def describe(self) -> str:
        return f"torch {torch.__version__}, {self.model.device}, {torch.get_num_threads()} threads, eager"

    def load(self) -> None:
        workload = self.workload
        self.model = MODELS[workload.family].from_seed(workload.config, workload.seed)
        self.cache = self.model.new_cache(1, workload.num_slots)

    @torch.inference_mode()
    def vision(self) -> None:
        self.features = self.model.encode_images(*self.pixels)
        self._wait()

    @torch.inference_mode()
    def prefill(self) -> np.ndarray:
        self.cache.reset()
        logits = self.model.prefill(self.model.merge(self.prompt_ids, [self.features]), self.cache)
        self.next_ids = logits.argmax(-1)
        return logits.cpu().numpy()

    @torch.inference_mode()
    def decode(self, num_tokens: int) -> list[int]:
        chosen = []
        for _ in range(num_tokens):
            self.next_ids = self.model.decode_step(self.next_ids, self.cache).argmax(-1)
            chosen.append(int(self.next_ids))
        return chosen

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
