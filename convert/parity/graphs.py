"""The MindSpore side of the logits check: loads the target as `predict` does and computes every stage.

`mindvlm.convert.parity.<family>.model` defines `FamilyStages`, a `ModelStages`.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.checkpoint import MemorySource, TensorInfo, open_checkpoint
from mindvlm.convert.parity.inputs import ParityRequest, Scope, inputs_of
from mindvlm.convert.parity.stages import GREEDY_IDS, STEP_LOGITS
from mindvlm.core import runtime
from mindvlm.core.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.request import Request
from mindvlm.models.loading import build_model
from mindvlm.models.registry import get_family
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.weights.rules.overlaid import OverlaidSource

logger = logging.getLogger(__name__)

Stages = dict[str, np.ndarray]


def run(request: ParityRequest, forced_ids: np.ndarray | None) -> tuple[str, Stages]:
    """Returns the framework in words, and the outputs by stage, see `process.SIDES`.

    Raises:
        UserError: the target cannot be read, or its tensors are not those that the config describes.
    """
    # CPU and float32, where both sides can agree
    context = runtime.start(runtime.RuntimeConfig(device="cpu"))
    framework = f"MindSpore {ms.__version__} on {ms.get_context('device_target')}, graph mode"
    logger.info(f"loading the target into {framework}")
    check, names = inputs_of(request.family), native_names(request.family, request.target)
    config = check.parity_config(request, names)
    scope = check.scope_of(names, config)
    model, _ = build_model(get_family(request.family), config, context)
    fill_target(model.set_train(False), request.family, request.target, names, without=scope.absent)
    stages = stages_for(model, scope, request)
    return framework, stages.compute(check.make_inputs(config, scope, request), forced_ids)


def stages_for(model: nn.Cell, scope: Scope, request: ParityRequest) -> ModelStages:
    """Returns the graphs of a filled model."""
    return importlib.import_module(f"{__package__}.{request.family}.model").FamilyStages(model, scope, request)


def native_names(family: str, path: str) -> tuple[str, ...]:
    """Returns the native names of the tensors of a target."""
    with open_checkpoint(path) as checkpoint:
        return tuple(get_family(family).native_view(checkpoint).infos)


def fill_target(
    model: nn.Cell, family: str, path: str, names: Collection[str], *, without: tuple[str, ...] = ()
) -> None:
    """Fills the parts of a model that the target has, as `mindvlm.load` does; the other parts take no memory.

    Args:
        model: to be filled.
        family: the family's name.
        path: the target.
        names: its native tensors.
        without: prefixes of parameters that the target lacks although it has their part; they become zero.

    Raises:
        UserError: the target cannot be read.
        ConversionError: its tensors are not those of the model.
    """
    parts = {name.partition(".")[0] for name in names}
    shapes = parameter_shapes(model)
    expected = {
        name: TensorInfo(name, "float32", shape)
        for name, shape in shapes.items()
        if name.partition(".")[0] in parts and not name.startswith(without)
    }
    zeros = {
        name: np.zeros(shape, np.float32) for name, shape in shapes.items() if without and name.startswith(without)
    }
    with open_checkpoint(path) as checkpoint:
        weights = get_family(family).native_view(checkpoint, target_infos=expected)
        source = OverlaidSource([("zeros", MemorySource(zeros)), (path, weights)])
        for part in sorted(parts):
            if isinstance(getattr(model, part, None), nn.Cell):
                fill_parameters(getattr(model, part), source, prefix=f"{part}.")


class TowerStages(nn.Cell):
    """pixels (N, 3, height, width) -> the tower's features, its last layer, its pooled class token."""

    def __init__(self, tower):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, pixels):
        states, pooled = self.tower.hidden_states(pixels)
        return self.tower(pixels), states[-1], pooled


class LayerStages(nn.Cell):
    """One pass without a cache -> the output of every layer (of the last one behind the norm), and the logits."""

    def __init__(self, language_model):
        super().__init__(auto_prefix=False)
        self.language_model = language_model

    def construct(self, embeds, inv_freq):
        states = self.language_model.layer_states(embeds, inv_freq)
        normed = self.language_model.norm(states[-1])
        return ops.stack((*states[1:-1], normed)), self.language_model.lm_head(normed)


class LanguageStages:
    """The graphs of a decoder; compiled once, they can run again after its parameters have changed.

    Args:
        model: a family's model.
        placeholder_id: the token that stands for one image feature row.
        num_tokens: maximum number of greedy steps.
    """

    def __init__(self, model: nn.Cell, *, placeholder_id: int, num_tokens: int) -> None:
        self.model, self.placeholder_id, self.num_tokens = model, placeholder_id, num_tokens
        self.layers = LayerStages(model.language_model)
        self.engine: Engine | None = None

    def compute(self, input_ids: np.ndarray, features: Tensor | None, forced_ids: np.ndarray | None) -> Stages:
        """Returns embeddings, layers and logits of one pass; then those of cached steps along `forced_ids`."""
        length = input_ids.shape[1]
        if self.engine is None:
            self.engine = Engine(
                self.model,
                placeholder_id=self.placeholder_id,
                max_length=length + self.num_tokens,
                on_compile=lambda stage: logger.info(f"compiling the {stage} graph"),
            )
        engine = self.engine
        logger.info(f"compiling and running a prompt of {length} tokens")
        embeds = engine.merged_embeddings(input_ids, features)
        inv_freq = engine.frequencies(engine.alpha_for(length))
        stages = named(("merged_embeddings",), (embeds,))
        stages |= named(("layers", "logits"), engine.runner.run("prefill", self.layers, embeds, inv_freq))
        if forced_ids is not None:
            options = GenerationConfig(max_new_tokens=len(forced_ids))
            slot = engine.add(
                Request(ids=input_ids[0].tolist(), features=features, options=options, forced_ids=forced_ids)
            )
            logger.info(f"running {len(forced_ids)} tokens")
            steps = []
            while engine.step():
                steps.append(engine.next_logits.asnumpy())
            engine.release(slot)
            stages[STEP_LOGITS] = np.concatenate(steps)
            stages[GREEDY_IDS] = stages[STEP_LOGITS].argmax(-1).astype(np.int32)
        return stages


class ModelStages(ABC):
    """The graphs of a model that may be there in parts; compiled once, they run again after parameters have changed.

    Args:
        model: filled as far as `scope` allows.
        scope: of the family.
        request: the settings of the comparison.
    """

    def __init__(self, model: nn.Cell, scope: Any, request: ParityRequest) -> None:
        self.scope = scope
        if scope.language_model:
            placeholder_id, num_tokens = self.placeholder_id(request), request.num_tokens
            self.language = LanguageStages(model, placeholder_id=placeholder_id, num_tokens=num_tokens)

    def placeholder_id(self, request: ParityRequest) -> int:
        """Returns the token that stands for one image feature row."""
        return PLACEHOLDER_ID

    @abstractmethod
    def vision_stages(self, inputs: Any) -> Stages:
        """Returns the outputs of the towers and the connector."""

    def compute(self, inputs: Any, forced_ids: np.ndarray | None) -> Stages:
        """Returns every stage that the scope allows, by the keys of `stages_of`."""
        runtime.set_mode(True)
        stages = self.vision_stages(inputs)
        if self.scope.language_model:
            features = Tensor(stages["connector"]) if self.scope.images else None
            stages |= self.language.compute(inputs.input_ids, features, forced_ids)
        return stages


def named(names: tuple[str, ...], outputs: tuple[Tensor, ...]) -> Stages:
    return {name: output.asnumpy() for name, output in zip(names, outputs, strict=True)}
