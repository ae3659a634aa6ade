"""Preprocessing of a picture for one vision tower."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images import transforms

ResizeMode = Literal["crop", "squash", "squash_bilinear", "keep", "pad"]
Padding = Literal["none", "centre"]


@dataclass(kw_only=True)
class ImageBranchConfig:
    """Preprocessing for one tower.

    Attributes:
        size: edge in pixels, or [height, width] for the squash modes.
        resize: "crop": resizes the shortest edge, then crops the centre square. "squash": resizes to the size without
            keeping the aspect ratio. "squash_bilinear": "squash" with OpenCV's interpolation. "keep", "pad": see
            `keep_aspect` and `pad_to_square`.
        mean, std: for red, green and blue, in 0..1.
        padding: "centre" first centres the picture on a square of the mean colour (LLaVA-1.5).
    """

    size: int | list[int]
    resize: ResizeMode
    mean: list[float] = field(default_factory=lambda: list(transforms.CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(transforms.CLIP_STD))
    padding: Padding = "none"

    def __post_init__(self) -> None:
        if self.resize not in get_args(ResizeMode):
            raise UserError(f"resize {self.resize!r}: expected one of {', '.join(get_args(ResizeMode))}")
        if self.padding not in get_args(Padding):
            raise UserError(f"padding {self.padding!r}: expected one of {', '.join(get_args(Padding))}")
        edges = (self.size,) if isinstance(self.size, int) else tuple(self.size)
        if len(edges) not in (1, 2) or not all(isinstance(edge, int) and edge > 0 for edge in edges):
            raise UserError(f"image size {self.size}: expected a positive number or [height, width]")
        if len(set(edges)) == 2 and not self.resize.startswith("squash"):
            raise UserError(
                f"image size {self.size}: resize {self.resize!r} needs a square; give one number, or a squash mode"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"image mean {self.mean}, std {self.std}: expected three values each, std above 0")

    @property
    def height_width(self) -> tuple[int, int]:
        """The size as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[-1])

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Returns the pixels (3, height, width) float32 of an RGB picture; the size varies with "keep" only."""
        normalize = transforms.normalize_scaled if self.resize == "squash_bilinear" else transforms.normalize
        return normalize(self.resized(image), mean=self.mean, std=self.std)

    def resized(self, image: Image.Image) -> Image.Image:
        """Returns the resized picture."""
        height, width = self.height_width
        if self.padding == "centre":
            image = transforms.centre_on_square(image, self.mean)
        if self.resize == "squash_bilinear":
            return transforms.squash_bilinear(image, height, width)
        if self.resize == "squash":
            return transforms.squash(image, height, width)
        if self.resize == "crop":
            return transforms.crop_to_square(image, height)
        if self.resize == "keep":
            return transforms.keep_aspect(image, height)
        return transforms.pad_to_square(image, height, self.mean)
