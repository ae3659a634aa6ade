"""Our own model as a contender in `benchmark.py`: the engine and the sampler that `mindvlm.load` uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm import runtime
from mindvlm.config import GenerationConfig
from mindvlm.convert.models import native_view
from mindvlm.convert.reference.random_weights import RandomSource
from mindvlm.convert.reference.vary_layout import parameter_shapes
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Generator
from mindvlm.models.common.weights import fill_parameters
from mindvlm.models.vary.config import from_hf_config
from mindvlm.models.vary.model import VaryModel


class MindvlmPeer:
    """See `mindvlm.tools.benchmark_stages.Peer`; the arguments are those of `TorchPeer`."""

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
        self.dtype = runtime.start(runtime.RuntimeConfig(seed=seed))
        self.config, self.seed, self.num_threads = config, seed, num_threads
        self.prompt_ids, self.pixels, self.num_slots = prompt_ids, pixels, num_slots

    def describe(self) -> str:
        target = ms.get_context("device_target")
        return f"mindvlm on MindSpore {ms.__version__}, {target}, {self.num_threads} threads, graph mode"

    def load(self) -> None:
        model_config = from_hf_config(self.config)
        model = VaryModel(model_config, self.dtype)
        weights = native_view(RandomSource(parameter_shapes(self.config), self.seed))
        fill_parameters(model, lambda name: weights.read(name).to_float32())
        self.engine = Engine(
            model, placeholder_id=self.config["im_patch_token"], max_length=max(model_config.max_length, self.num_slots)
        )
        self.sampler = Generator(self.engine).sampler(GenerationConfig(), 1)

    def vision(self) -> None:
        self.features = self.engine.encode_images(*self.pixels)

    def prefill(self) -> np.ndarray:
        self.engine.reset(1)
        logits = self.engine.append(self.prompt_ids.tolist(), self.features)
        self.next_ids = self._choose(logits)
        return logits.asnumpy()

    def decode(self, num_tokens: int) -> list[int]:
        chosen = []
        for _ in range(num_tokens):
            self.next_ids = self._choose(self.engine.step(self.next_ids))
            chosen.append(int(self.next_ids.asnumpy()[0]))
        return chosen

    def _choose(self, logits: Tensor) -> Tensor:
        counts, uniform = Tensor(np.ones(1, np.int32)), Tensor(np.zeros(1, np.float32))
        return self.engine.run("decode", self.sampler, logits, counts, uniform)
