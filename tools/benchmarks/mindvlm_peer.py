"""Our own model as a contender of the benchmark: the engine of `mindvlm.load` and the training step of the trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.core import runtime
from mindvlm.core.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.request import Request
from mindvlm.models import loading
from mindvlm.models.registry import get_family
from mindvlm.native.library import open_library
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters
from mindvlm.nn.products import WeightProduct
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.parallel.mesh import ParallelConfig, init_parallel
from mindvlm.tools.benchmarks.worker import InferencePeer
from mindvlm.tools.benchmarks.workload import Workload
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep


class Inference(InferencePeer):
    """The engine that `mindvlm.load` uses, with a value of the key `weights`."""

    def __init__(self, workload: Workload, *, dtype: str, num_threads: int) -> None:
        self.context = runtime.start(runtime.RuntimeConfig(seed=workload.seed))
        self.workload, self.dtype, self.num_threads = workload, dtype, num_threads
        self.prompt_ids, self.pixels = workload.prompt_ids, workload.pixels

    def describe(self) -> dict[str, Any]:
        library = open_library()
        kernels = f"kernels for {library.instruction_set}" if library else "no native kernels"
        model = self.engine.model
        decoder = model.language_model
        read = stored_bytes(decoder) - (0 if decoder.config.tie_word_embeddings else stored_bytes(decoder.embed_tokens))
        text = f"{described(self.num_threads)}, weights {self.dtype}, {kernels}"
        return {"text": text, "stored_bytes": stored_bytes(model), "decode_bytes": read}

    def load(self) -> None:
        workload = self.workload
        model_config = workload.model_config
        rules = native_rules(self.dtype, ms.get_context("device_target"))
        context = replace(self.context, linear=self.context.linear + rules)
        self.engine = Engine(
            build_model(workload, model_config, context),
            placeholder_id=workload.placeholder_id,
            max_length=max(model_config.max_length, workload.total_length),
        )

    def compile_seconds(self) -> float:
        return self.engine.runner.seconds["compile"]

    def vision(self) -> None:
        self.features = self.engine.encode_images(*self.pixels)

    def prompt_logits(self) -> np.ndarray:
        self.start(self.prompt_ids, self.features, self.workload.total_length)
        return self.engine.next_logits.asnumpy()

    def start(self, ids: np.ndarray, features: Tensor | None, capacity: int) -> None:
        """Prefills prompts (B, L) and chooses their first tokens."""
        self.engine.resize(len(ids))
        # room for the answer, as the others have: a cache that grew while decoding would compile its graphs there
        self.engine.reserve(capacity)
        options = GenerationConfig(max_new_tokens=capacity)
        for row in ids.tolist():
            self.slot = self.engine.add(Request(ids=row, features=features, options=options))
        self.engine.step()

    def generate(self, num_tokens: int) -> list[int]:
        chosen = []
        for _ in range(num_tokens):
            self.engine.step()
            chosen.append(self.slot.new_ids[-1])
        return chosen

    def start_rows(self, ids: np.ndarray, capacity: int) -> None:
        self.start(ids, None, capacity)

    def continue_rows(self, num_tokens: int) -> None:
        self.generate(num_tokens)


class Training:
    """The training step of the trainer; implements `TrainingPeer`. With `num_processes`, one of as many replicas."""

    def __init__(self, workload: Any, *, num_threads: int, dtype: str = "float32", num_processes: int = 1) -> None:
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
    """Returns the model of the workload, filled with its weights."""
    family = get_family(workload.family)
    model, _ = loading.build_model(family, config, context)
    if context.linear and (library := open_library()):
        use_native_cells(model, library)
    with workload.source() as source:
        fill_parameters(model, family.native_view(source))
    return model


def stored_bytes(cell: ms.nn.Cell) -> int:
    """Returns the size of all weights below a Cell as they are stored."""
    products = [one for _, one in cell.cells_and_names() if isinstance(one, WeightProduct)]
    held = {id(parameter) for product in products for parameter in product.get_parameters()}
    others = sum(parameter.nbytes for parameter in cell.get_parameters() if id(parameter) not in held)
    return others + sum(product.num_bytes for product in products)


def described(num_threads: int) -> str:
    target = ms.get_context("device_target")
    return f"mindvlm on MindSpore {ms.__version__}, {target}, {num_threads} threads, graph mode"
