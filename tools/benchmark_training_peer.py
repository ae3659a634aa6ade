"""Our own training step as a contender in the training benchmark: the one that `tools/train.py` uses."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor

from mindvlm.convert.reference.random_weights import RandomSource
from mindvlm.convert.reference.vary_layout import parameter_shapes
from mindvlm.core import runtime
from mindvlm.models.vary.config import from_hf_config
from mindvlm.models.vary.model import VaryModel
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.parallel.config import ParallelConfig
from mindvlm.parallel.mesh import init_parallel
from mindvlm.tools.benchmark_training_workload import TrainingWorkload
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.weights.fill import fill_parameters
from mindvlm.weights.recognise import native_view


class MindvlmTrainingPeer:
    """See `mindvlm.tools.benchmark_training_worker.TrainingPeer`; with `num_processes` one of as many replicas."""

    def __init__(self, workload: TrainingWorkload, *, num_threads: int, num_processes: int = 1) -> None:
        self.dtype = runtime.start(runtime.RuntimeConfig(device="cpu", seed=workload.seed))
        self.parallel = ParallelConfig(dp=num_processes)
        self.mesh = init_parallel(self.parallel)
        self.workload, self.num_threads = workload, num_threads

    def describe(self) -> str:
        target = ms.get_context("device_target")
        return f"mindvlm on MindSpore {ms.__version__}, {target}, {self.num_threads} threads, graph mode"

    def load(self) -> None:
        workload = self.workload
        config = from_hf_config(workload.config)
        model = VaryModel(config, self.dtype)
        weights = native_view(RandomSource(parameter_shapes(workload.config), workload.seed))
        fill_parameters(model, lambda name: weights.read(name).to_float32())
        optimizer = OptimizerConfig(learning_rate=workload.learning_rate, max_grad_norm=workload.max_grad_norm)
        self.train_step = TrainStep(
            model.set_train(), optimizer, parallel=self.parallel, mesh=self.mesh, recompute=workload.recompute
        )
        decoder = config.language_model
        ids = workload.input_ids
        placeholder = workload.config["im_patch_token"]
        self.arguments = [
            Tensor(workload.learning_rate, ms.float32),
            Tensor(ids),
            Tensor(workload.labels),
            Tensor(inverse_frequencies(decoder.head_dim, decoder.rope_theta)),
            *map(Tensor, workload.pixels),
            Tensor(splice_sources(ids, len(ids), config.image_token_len, placeholder)),
        ]

    def compile(self) -> None:
        self.train_step.compile(*self.arguments)

    def step(self) -> float:
        return float(self.train_step(*self.arguments).loss.asnumpy())
