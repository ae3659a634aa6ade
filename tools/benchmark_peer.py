"""Our own model as a contender in `benchmark.py`: the engine and the sampler that `mindvlm.load` uses."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.convert.reference.random_weights import RandomSource
from mindvlm.core import runtime
from mindvlm.core.config import GenerationConfig
from mindvlm.families import get_family
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Generator
from mindvlm.models.tinyllava import hf_config
from mindvlm.models.vary import config as vary_config
from mindvlm.tools.benchmark_workload import Workload
from mindvlm.weights.fill import fill_parameters

MODEL_CONFIGS = {"vary": vary_config.from_hf_config, "tinyllava": hf_config.from_hf_config}


class MindvlmPeer:
    """See `mindvlm.tools.benchmark_stages.Peer`; the arguments are those of `TorchPeer`."""

    def __init__(self, workload: Workload, *, num_threads: int) -> None:
        self.dtype = runtime.start(runtime.RuntimeConfig(seed=workload.seed))
        self.workload, self.num_threads = workload, num_threads
        self.prompt_ids, self.pixels = workload.prompt_ids, workload.pixels

    def describe(self) -> str:
        target = ms.get_context("device_target")
        return f"mindvlm on MindSpore {ms.__version__}, {target}, {self.num_threads} threads, graph mode"

    def load(self) -> None:
        workload = self.workload
        family = get_family(workload.family)
        model_config = MODEL_CONFIGS[workload.family](workload.config)
        model = family.model(model_config, self.dtype)
        weights = family.native_view(RandomSource(workload.shapes, workload.seed))
        fill_parameters(model, lambda name: weights.read(name).to_float32())
        self.engine = Engine(
            model,
            placeholder_id=workload.placeholder_id,
            max_length=max(model_config.max_length, workload.num_slots),
        )
        self.sampler = Generator(self.engine).sampler(GenerationConfig(), 1)

    def vision(self) -> None:
        self.features = self.engine.encode_images(*self.pixels)

    def prefill(self) -> np.ndarray:
        self.engine.reset(1)
        # room for the answer, as the torch peer has: a cache that grew while decoding would compile its graphs there
        self.engine.ensure_slots(self.workload.num_slots)
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
