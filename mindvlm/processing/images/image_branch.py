"""What happens to a picture between its file and one vision tower, as typed settings."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images import transforms
from mindvlm.processing.images.margins import pad_to_aspect, paper_colour, trim_margins
from mindvlm.processing.images.text_lines import lines_side_by_side

ResizeMode = Literal["crop", "squash", "squash_bilinear", "keep", "pad"]
Padding = Literal["none", "centre"]


@dataclass(kw_only=True)
class ImageBranchConfig:
    """How one of the two towers gets its picture.

    Attributes:
        size: edge in pixels, or (height, width) for the squash modes.
        resize: "crop": shortest edge to size, middle square (CLIP tower of Vary-toy). "squash": straight to the size
            (vision vocabulary of Vary-toy). "squash_bilinear": the same as OpenCV does it (Vary-base, Vary-tiny).
            "keep", "pad": the training options of the original for the CLIP tower.
        mean, std: of red, green and blue, in 0..1.
        padding: "centre" puts the picture on a square of the mean colour before anything else (LLaVA-1.5).
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
            raise UserError(f"image size {self.size}: resize {self.resize!r} makes squares; give one number or squash")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"image mean {self.mean}, std {self.std}: expected three values each, std above 0")

    @property
    def height_width(self) -> tuple[int, int]:
        """The size as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[-1])

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(3, height, width) float32 of an RGB picture; only "keep" gives another size."""
        normalize = transforms.normalize_scaled if self.resize == "squash_bilinear" else transforms.normalize
        return normalize(self.resized(image), mean=self.mean, std=self.std)

    def resized(self, image: Image.Image) -> Image.Image:
        """The picture before its values are normalised."""
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


@dataclass(kw_only=True)
class TrimConfig:
    """Cut the empty paper away before resizing, then add paper on the right or below to stay within the aspects.

    Attributes:
        lines: "side_by_side" lays several lines of print out as one, see `lines_side_by_side`.
        margin: pixels of paper that stay around the ink.
        min_aspect, max_aspect: of width to height.
    """

    lines: Literal["as_they_are", "side_by_side"] = "as_they_are"
    margin: int = 0
    min_aspect: float = 0.0
    max_aspect: float = float("inf")

    def __post_init__(self) -> None:
        if self.margin < 0 or not 0 <= self.min_aspect <= self.max_aspect or self.max_aspect <= 0:
            raise UserError(
                f"trim: margin {self.margin}, aspects {self.min_aspect} to {self.max_aspect}: expected margin >= 0 and "
                "0 <= min_aspect <= max_aspect"
            )

    def apply(self, image: Image.Image) -> Image.Image:
        """The trimmed and padded picture."""
        shown = lines_side_by_side(image) if self.lines == "side_by_side" else image
        if shown is image:
            shown = trim_margins(image, margin=self.margin)
        # what is left may be nothing but ink, so the paper is that of the whole picture
        return pad_to_aspect(shown, self.min_aspect, max_aspect=self.max_aspect, colour=paper_colour(image))
