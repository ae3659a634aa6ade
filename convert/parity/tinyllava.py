"""Our side of the logits check: every stage of a TinyLLaVA, opened and computed as `predict` does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.convert.parity.comparison import ParityRequest
from mindvlm.convert.parity.graphs import LanguageStages, Say, Stages, TowerStages, named, start
from mindvlm.convert.parity.tinyllava_inputs import (
    PARTS,
    TinyLlavaInputs,
    TinyLlavaScope,
    parity_form,
    tinyllava_inputs,
)
from mindvlm.core import runtime
from mindvlm.families import get_family
from mindvlm.models.hf.towers import vit_config
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.weights.fill import fill_parameters, parameter_shapes

FAMILY = "tinyllava"
TOWER = ("tower_features", "tower_last_hidden", "tower_pooled")


class ImageStages(nn.Cell):
    """pixels (N, 3, height, width) -> the stages of the tower, and what `encode_images` gives, in one graph."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.tower = TowerStages(model.vision_tower)

    def construct(self, pixels):
        return *self.tower(pixels), self.model.encode_images(pixels)


def run(request: ParityRequest, forced_ids: np.ndarray | None, say: Say) -> tuple[str, dict[str, np.ndarray]]:
    """See `mindvlm.convert.parity.ParityModel`.

    Raises:
        UserError: the target cannot be read, or its tensors are not those that the config describes.
    """
    dtype, framework = start()
    say(f"loading the target into {framework}")
    names = native_names(request.target)
    form = parity_form(request.config, request.model, names)
    scope = TinyLlavaScope.of(names, form)
    model = get_family(FAMILY).model(model_config(request.config, form), dtype).set_train(False)
    fill_target(model, request.target, names)
    stages = TinyLlavaStages(model, scope, request.num_tokens, say)
    return framework, stages.compute(tinyllava_inputs(form, request.seed, image=scope.images), forced_ids)


def native_names(path: str) -> tuple[str, ...]:
    """The native tensors of a target."""
    with open_checkpoint(path) as checkpoint:
        return tuple(get_family(FAMILY).native_view(checkpoint).infos)


def model_config(config: Mapping[str, Any], form: Mapping[str, Any]) -> TinyLlavaModelConfig:
    """The config of our model; a SigLIP alone may have its last layer, which a whole TinyLLaVA has not."""
    found = from_hf_config(config)
    if found.language_model is None:
        keeps = form["vision_config"]["keeps_last_layer"]
        found = dataclasses.replace(found, vision_tower=vit_config(config, keeps_last_layer=keeps))
    return found


def fill_target(model: nn.Cell, path: str, names: Collection[str]) -> None:
    """Fill those parts of the model that the target has, in the way of `mindvlm.api.load`; the others cost nothing."""
    parts = {name.partition(".")[0] for name in names}
    expected = {
        name: TensorInfo(name, "float32", shape)
        for name, shape in parameter_shapes(model).items()
        if name.partition(".")[0] in parts
    }
    with open_checkpoint(path) as checkpoint:
        weights = get_family(FAMILY).native_view(checkpoint, target_infos=expected)
        for part in sorted(parts & PARTS.keys()):
            fill_parameters(getattr(model, part), lambda name, part=part: weights.read(f"{part}.{name}").to_float32())


class TinyLlavaStages:
    """The graphs of one model; compiled once, they can run again after its parameters have changed.

    Args:
        model: filled as far as `scope` says.
        num_tokens: the most greedy steps.
        say: called with one line before each slow step.
    """

    def __init__(self, model: nn.Cell, scope: TinyLlavaScope, num_tokens: int, say: Say) -> None:
        self.scope, self.say = scope, say
        if scope.images:
            self.images = ImageStages(model)
        elif scope.tower:
            self.tower = TowerStages(model.vision_tower)
        elif scope.connector:
            self.connector = model.mm_projector
        if scope.language_model:
            self.language = LanguageStages(model, placeholder_id=PLACEHOLDER_ID, num_tokens=num_tokens, say=say)

    def compute(self, inputs: TinyLlavaInputs, forced_ids: np.ndarray | None) -> Stages:
        """Every stage that the parts allow, by the keys of `mindvlm.convert.parity.MODELS`."""
        stages = self.vision_stages(inputs)
        if self.scope.language_model:
            features = Tensor(stages["connector"]) if self.scope.images else None
            stages |= self.language.compute(inputs.input_ids, features, forced_ids)
        return stages

    def vision_stages(self, inputs: TinyLlavaInputs) -> Stages:
        runtime.set_mode(True)
        if self.scope.images:
            self.say("compiling and running the tower and the connector")
            return named((*TOWER, "connector"), self.images(Tensor(inputs.pixels)))
        if self.scope.tower:
            self.say("compiling and running the tower")
            return named(TOWER, self.tower(Tensor(inputs.pixels)))
        if self.scope.connector:
            return named(("connector",), (self.connector(Tensor(inputs.features)),))
        return {}
