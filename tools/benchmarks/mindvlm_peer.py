"""Our own model as a contender of the benchmark: the engine of `mindvlm.load` and the training step of the trainer."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.convert.random_weights import RandomSource
from mindvlm.core import runtime
from mindvlm.core.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.request import Request
from mindvlm.models import loading
from mindvlm.models.registry import get_family
from mindvlm.nn.parameters import fill_parameters
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.parallel.mesh import ParallelConfig, init_parallel
from mindvlm.tools.benchmarks.worker import InferencePeer
from mindvlm.tools.benchmarks.workload import Workload
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep


class Inference(InferencePeer):
    """The engine that `mindvlm.load` uses."""

    def __init__(self, workload: Workload, *, num_threads: int) -> None:
        self.context = runtime.start(runtime.RuntimeConfig(seed=workload.seed))
        self.workload, self.num_threads = workload, num_threads
        self.prompt_ids, self.pixels = workload.prompt_ids, workload.pixels

    def describe(self) -> str:
        return described(self.num_threads)

    def load(self) -> None:
        workload = self.workload
        model_config = workload.model_config
        self.engine = Engine(
            build_model(workload, model_config, self.context),
            placeholder_id=workload.placeholder_id,
            max_length=max(model_config.max_length, workload.total_length),
        )

    def vision(self) -> None:
        self.features = self.engine.encode_images(*self.pixels)

    def prompt_logits(self) -> np.ndarray:
        workload = self.workload
        self.engine.resize(1)
        # room for the answer, as the torch peer has: a cache that grew while decoding would compile its graphs there
        self.engine.reserve(workload.total_length)
        options = GenerationConfig(max_new_tokens=workload.num_tokens + 1)
        self.slot = self.engine.add(Request(ids=self.prompt_ids[0].tolist(), features=self.features, options=options))
        self.engine.step()
        return self.engine.next_logits.asnumpy()

    def generate(self, num_tokens: int) -> list[int]:
        chosen = []
        for _ in range(num_tokens):
            self.engine.step()
            chosen.append(self.slot.new_ids[-1])
        return chosen


class Training:
    """The training step of the trainer; implements `TrainingPeer`. With `num_processes`, one of as many replicas."""

    def __init__(self, workload: Any, *, num_threads: int, num_processes: int = 1) -> None:
        self.context = runtime.start(runtime.RuntimeConfig(device="cpu", seed=workload.seed))
        self.parallel = ParallelConfig(dp=num_processes)
        self.mesh = init_parallel(self.parallel)
        self.workload, self.num_threads = workload, num_threads

    def describe(self) -> str:
        return described(self.num_threads)

    def load(self) -> None:
        workload = self.workload
        config = workload.model_config
        model = build_model(workload, config, self.context)
        optimizer = OptimizerConfig(learning_rate=workload.learning_rate, max_grad_norm=workload.max_grad_norm)
        self.train_step = TrainStep(
            model.set_train(), optimizer, parallel=self.parallel, mesh=self.mesh, recompute=workload.recompute
        )
        ids = workload.input_ids
        self.arguments = [
            Tensor(workload.learning_rate, ms.float32),
            Tensor(ids),
            Tensor(workload.labels),
            Tensor(decoder_frequencies(config.language_model)),
            *map(Tensor, workload.pixels),
            Tensor(splice_sources(ids, len(ids), config.image_token_len, workload.placeholder_id)),
        ]

    def compile(self) -> None:
        self.train_step.compile(*self.arguments)

    def step(self) -> float:
        return float(self.train_step(*self.arguments).loss.asnumpy())


def build_model(workload: Any, config: Any, context: runtime.BuildContext) -> ms.nn.Cell:
    """Returns the model of the workload, filled with its random weights."""
    family = get_family(workload.family)
    model, _ = loading.build_model(family, config, context)
    weights = family.native_view(RandomSource(workload.shapes, workload.seed))
    fill_parameters(model, weights)
    return model


def described(num_threads: int) -> str:
    target = ms.get_context("device_target")
    return f"mindvlm on MindSpore {ms.__version__}, {target}, {num_threads} threads, graph mode"
