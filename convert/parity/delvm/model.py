"""The MindSpore side of DeLVM's logits check: the stages of the VQGAN, computed as `predict` does."""

from __future__ import annotations

import logging

from mindspore import Tensor, nn

from mindvlm.convert.parity.delvm.inputs import DelvmInputs, DelvmScope
from mindvlm.convert.parity.graphs import ModelStages, Stages, named
from mindvlm.convert.parity.inputs import ParityRequest

logger = logging.getLogger(__name__)


class VqganStages(nn.Cell):
    """Pixels and codes -> the latent of the pixels, (1, E, r, k), and the picture of the codes."""

    def __init__(self, vqgan):
        super().__init__(auto_prefix=False)
        self.vqgan = vqgan

    def construct(self, pixels, codes):
        return self.vqgan.latent(pixels).transpose((0, 3, 1, 2)), self.vqgan.decode_codes(codes)


class FamilyStages(ModelStages):
    def __init__(self, model: nn.Cell, scope: DelvmScope, request: ParityRequest) -> None:
        super().__init__(model, scope, request)
        if scope.vqgan:
            self.vqgan = VqganStages(model.vqgan)

    def vision_stages(self, inputs: DelvmInputs) -> Stages:
        if not self.scope.vqgan:
            return {}
        logger.info("compiling and running the VQGAN")
        return named(("latent", "decoded"), self.vqgan(Tensor(inputs.pixels), Tensor(inputs.codes)))
