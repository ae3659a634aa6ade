"""The MindSpore side of TinyLLaVA's logits check: the stages before the decoder, computed as `predict` does."""

from __future__ import annotations

import logging

from mindspore import Tensor, nn

from mindvlm.convert.parity.graphs import ModelStages, Stages, TowerStages, named
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.stages import TOWER_STAGES
from mindvlm.convert.parity.tinyllava.inputs import TinyLlavaInputs, TinyLlavaScope

logger = logging.getLogger(__name__)

TOWER = tuple(TOWER_STAGES)


class ImageStages(nn.Cell):
    """pixels (N, 3, height, width) -> the stages of the tower and the output of `encode_images`, in one graph."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.tower = TowerStages(model.vision_tower)

    def construct(self, pixels):
        return *self.tower(pixels), self.model.encode_images(pixels)


class FamilyStages(ModelStages):
    def __init__(self, model: nn.Cell, scope: TinyLlavaScope, request: ParityRequest) -> None:
        super().__init__(model, scope, request)
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
