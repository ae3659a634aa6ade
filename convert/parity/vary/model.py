"""The MindSpore side of Vary's logits check: the stages before the decoder, computed as `predict` does."""

from __future__ import annotations

import logging

import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.convert.parity.graphs import ModelStages, Stages, TowerStages, named
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.vary.inputs import VaryInputs, VaryScope
from mindvlm.models.vary.hf_config import ImageTokens

logger = logging.getLogger(__name__)

CLIP = ("clip_features", "clip_last_hidden", "clip_pooled")
VOCABULARY = ("vocabulary_neck", "vocabulary_features")


class VocabularyStages(nn.Cell):
    """pixels (N, 3, height, width) -> the neck's output (N, rows, columns, width) and the tokens (N, T, width)."""

    def __init__(self, tower):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, pixels):
        stages = self.tower.stages(pixels)
        return stages[-4], stages[-1]


class Connector(nn.Cell):
    """Features of both towers -> (N, T, hidden), for projectors without towers."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.clip, self.vocabulary = model.mm_projector, model.mm_projector_vary

    def construct(self, clip, vocabulary):
        return ops.concat((self.clip(clip), self.vocabulary(vocabulary)), -1)


class VisionStages(nn.Cell):
    """All stages before the decoder in one graph for a complete model; the last output is that of `encode_images`."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.clip = None if model.config.is_tiny else TowerStages(model.vision_tower)
        self.vocabulary = VocabularyStages(model.vision_vocabulary)

    def construct(self, *pixels):
        stages = (*self.vocabulary(pixels[-1]), self.model.encode_images(*pixels))
        return stages if self.clip is None else (*self.clip(pixels[0]), *stages)


class FamilyStages(ModelStages):
    def __init__(self, model: nn.Cell, scope: VaryScope, request: ParityRequest) -> None:
        super().__init__(model, scope, request)
        if scope.images:
            self.vision = VisionStages(model)
        if scope.clip:
            self.clip = TowerStages(model.vision_tower)
        if scope.neck:
            self.vocabulary = VocabularyStages(model.vision_vocabulary)
        if scope.connector:
            self.connector = model.mm_projector if model.config.is_tiny else Connector(model)

    def placeholder_id(self, request: ParityRequest) -> int:
        return ImageTokens.of(request.config).patch

    def compute(self, inputs: VaryInputs, forced_ids: np.ndarray | None) -> Stages:
        stages = super().compute(inputs, forced_ids)
        if not self.scope.vocabulary:
            # the output of convolutions that the target lacks
            stages.pop(VOCABULARY[-1], None)
        return stages

    def vision_stages(self, inputs: VaryInputs) -> Stages:
        clip_pixels, high_pixels = inputs.clip_pixels, inputs.high_pixels
        if self.scope.images:
            logger.info("compiling and running the towers and the connector")
            names, pixels = (*VOCABULARY, "connector"), (Tensor(high_pixels),)
            if self.scope.clip:
                names, pixels = (*CLIP, *names), (Tensor(clip_pixels), *pixels)
            return named(names, self.vision(*pixels))
        stages: Stages = {}
        if self.scope.clip:
            logger.info("compiling and running the CLIP tower")
            stages |= named(CLIP, self.clip(Tensor(clip_pixels)))
        if self.scope.neck:
            logger.info("compiling and running the vision vocabulary")
            stages |= named(VOCABULARY, self.vocabulary(Tensor(high_pixels)))
        if self.scope.connector:
            stages |= named(("connector",), (self.connector(*map(Tensor, inputs.features)),))
        return stages
