"""The loss of a VQGAN in training.

N pictures, P positions (R * K), E width of a code, V codes.
"""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import nn, ops

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.vqgan import Vqgan


@dataclass(kw_only=True)
class PictureLossConfig:
    """The terms of the loss, the section `vqgan_loss` of a job.

    Attributes:
        reconstruction: mean of the squared ("l2") or absolute ("l1") differences of the pixels.
        codebook_weight: factor of the codebook loss, see `Quantizer.losses`.
        usage_weight: factor of the term that keeps all codes in use, relative to the reconstruction loss. The term is
            lowest if each position is clearly nearest to one code and a pass uses all codes equally often.
        bypass: share of the pictures of a pass that the decoder receives without quantization, rounded down.
    """

    reconstruction: Literal["l2", "l1"] = "l2"
    codebook_weight: float = 1.0
    usage_weight: float = 0.1
    bypass: float = 0.0

    def __post_init__(self) -> None:
        for key in ("codebook_weight", "usage_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(f"vqgan_loss.{key} is {getattr(self, key)}; expected at least 0")
        if not 0 <= self.bypass < 1:
            raise UserError(f"vqgan_loss.bypass is {self.bypass}; expected 0 to below 1")


class PictureLoss(nn.Cell):
    """Trains a VQGAN to reproduce pictures through its codes.

    The decoder's gradient passes to the encoder as if nothing were quantized. The perceptual and the adversarial term
    of the original are left out.
    """

    loss_terms = ("loss_pixels", "loss_codebook", "loss_usage")

    def __init__(self, vqgan: Vqgan, config: PictureLossConfig):
        super().__init__(auto_prefix=False)
        self.vqgan = vqgan
        self.is_squared = config.reconstruction == "l2"
        self.codebook_weight, self.usage_weight, self.bypass = (
            config.codebook_weight,
            config.usage_weight,
            config.bypass,
        )

    def construct(self, pixels):
        """Returns the sums of the terms over the pictures, (3,) float32, and the number of pictures."""
        vqgan, num_pictures = self.vqgan, pixels.shape[0]
        latent = vqgan.latent(pixels)
        distances = vqgan.quantize.distances(latent)
        codes = ops.argmin(distances, 1).astype(ms.int32).reshape((num_pictures, -1))
        codebook_loss, passed = vqgan.quantize.losses(latent, vqgan.entries(codes, latent.shape[1]))
        num_bypassed = int(num_pictures * self.bypass)
        if num_bypassed:
            passed = ops.concat((latent[:num_bypassed], passed[num_bypassed:]), 0)
        difference = vqgan.decode(passed) - pixels
        loss = (ops.square(difference) if self.is_squared else ops.abs(difference)).mean()
        usage = self.usage_weight * ops.stop_gradient(loss) * usage_loss(distances)
        terms = ops.stack((loss, self.codebook_weight * codebook_loss, usage))
        return terms * num_pictures, ops.full((), num_pictures, dtype=ms.float32)


def usage_loss(distances):
    """Returns the mean entropy of each position's choice less the entropy of all choices, from -log(V) to 0.

    A choice is a distribution over the codes, soft at the scale of the distance to the nearest code. The codes that
    are used too seldom so get a gradient towards the positions, and no code stays unused.

    Args:
        distances: squared distances of positions and codes, (N * P, V).
    """
    scale = ops.stop_gradient(ops.amin(distances, 1).mean()) + 1e-6
    logarithms = ops.log_softmax(-distances / scale, -1)
    choices = ops.exp(logarithms)
    mean = choices.mean(0)
    return (mean * ops.log(mean + 1e-9)).sum() - (choices * logarithms).sum(-1).mean()
