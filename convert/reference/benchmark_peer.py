"""The torch reference as a contender in `tools/benchmark.py`: eager, float32, one preallocated cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mindvlm.convert.reference.vary import ReferenceVary


class TorchPeer:
    """See `mindvlm.tools.benchmark_stages.Peer`.

    Args:
        config: official config.json as a dict.
        seed: of the random weights.
        prompt_ids: (1, L) int32.
        pixels: (1, 3, height, width) float32 of the CLIP and of the vocabulary branch.
        num_slots: capacity of the cache.
        num_threads: for torch's operators.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        seed: int,
        prompt_ids: np.ndarray,
        pixels: tuple[np.ndarray, np.ndarray],
        num_slots: int,
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.config, self.seed, self.num_slots = config, seed, num_slots
        self.prompt_ids = torch.from_numpy(prompt_ids)
        self.pixels = tuple(torch.from_numpy(branch) for branch in pixels)

    def describe(self) -> str:
        return f"torch {torch.__version__}, {self.model.device}, {torch.get_num_threads()} threads, eager"

    def load(self) -> None:
        self.model = ReferenceVary.from_seed(self.config, self.seed)
        self.cache = self.model.new_cache(1, self.num_slots)

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
