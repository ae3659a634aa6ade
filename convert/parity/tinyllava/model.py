"""The MindSpore side of TinyLLaVA's logits check: every stage, loaded and computed as `predict` does it."""

from __future__ import annotations

import logging

import numpy as np
from mindspore import Tensor, nn

from mindvlm.convert.parity.graphs import ModelStages, Stages, TowerStages, fill_target, named, native_names, start
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.tinyllava.inputs import TinyLlavaInputs, TinyLlavaScope, parity_config, tinyllava_inputs
from mindvlm.models.loading import build_model
from mindvlm.models.registry import get_family
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID

logger = logging.getLogger(__name__)

TOWER = ("tower_features", "tower_last_hidden", "tower_pooled")


class ImageStages(nn.Cell):
    """pixels (N, 3, height, width) -> the stages of the tower and the output of `encode_images`, in one graph."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.tower = TowerStages(model.vision_tower)

    def construct(self, pixels):
        return *self.tower(pixels), self.model.encode_images(pixels)


def run(request: ParityRequest, forced_ids: np.ndarray | None) -> tuple[str, Stages]:
    """Returns the framework in words, and the outputs by stage, see `process.SIDES`.

    Raises:
        UserError: the target cannot be read, or its tensors are not those that the config describes.
    """
    context, framework = start()
    logger.info(f"loading the target into {framework}")
    names = native_names(request.family, request.target)
    config = parity_config(request.config, request.model, names)
    scope = TinyLlavaScope.of(names, config)
    model, _ = build_model(get_family(request.family), config, context)
    model.set_train(False)
    fill_target(model, request.family, request.target, names)
    stages = TinyLlavaStages(model, scope, placeholder_id=PLACEHOLDER_ID, num_tokens=request.num_tokens)
    return framework, stages.compute(tinyllava_inputs(config, request.seed, image=scope.images), forced_ids)


class TinyLlavaStages(ModelStages):
    def __init__(self, model: nn.Cell, scope: TinyLlavaScope, **options: int) -> None:
        super().__init__(model, scope, **options)
        if scope.images:
            self.images = ImageStages(model)
        elif scope.tower:
            self.tower = TowerStages(model.vision_tower)
        elif scope.connector:
            self.connector = model.mm_projector

    def vision_stages(self, inputs: TinyLlavaInputs) -> Stages:
        if self.scope.images:
            logger.info("compiling and running the tower and the connector")
            return named((*TOWER, "connector"), self.images(Tensor(inputs.pixels)))
        if self.scope.tower:
            logger.info("compiling and running the tower")
            return named(TOWER, self.tower(Tensor(inputs.pixels)))
        if self.scope.connector:
            return named(("connector",), (self.connector(Tensor(inputs.features)),))
        return {}
