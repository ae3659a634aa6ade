"""The views of a picture: a global view and local crops, and the order of their feature rows.

Sizes are (width, height), grids are (columns, rows).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images import transforms
from mindvlm.processing.images.picture import NEWLINE
from mindvlm.processing.images.tiling import Size, choose_resolution, fit_on_black

Mode = Literal["anyres", "any_res", "pad_then_devide", "pad", "plain"]
Use = Literal["both", "global", "local"]
Merge = Literal["spatial", "flat"]
SEPARATOR = NEWLINE
"""Entry of a layout: the row between global and local rows. It is the last feature row."""

MAX_NUMBER = 6
# as in the versions of Pillow that the original program ran with
resize = partial(transforms.resize, rows_first=True)
MAX_BUCKET = 2
"""Largest number of crops that pass the tower together."""
# constants of `pad_then_devide`
LARGE_EDGE, WINDOW, STRIDE = 1024, 336, 308
MAX_CROPS = {"anyres": MAX_NUMBER + 1, "any_res": MAX_NUMBER + 1, "pad_then_devide": 9, "pad": 0, "plain": 0}


@dataclass(kw_only=True)
class ViewsConfig:
    """How a picture becomes views of the tower's size. The modes have the names of `image_aspect_ratio`.

    Attributes:
        size: edge of a view in pixels.
        mode: "anyres": the squashed picture, and the crops of `canvas_crops`. "any_res": the padded
            picture, and padded slices of the picture. "pad_then_devide": the padded picture, and 3 x 3 overlapping
            windows of it at 1024 pixels. "pad": the padded picture only. "plain": CLIP's centre crop only.
        use: the views that the model uses ("global", "local" or "both").
        merge: order of the local rows. "spatial": line by line over all crops. "flat": crop by crop.
        num_global_tokens: feature rows of the global view.
        num_local_tokens: feature rows of a crop.
    """

    size: int = 336
    mode: Mode = "anyres"
    use: Use = "both"
    merge: Merge = "spatial"
    num_global_tokens: int = 576
    num_local_tokens: int = 144

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("use", Use), ("merge", Merge)):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"processor.views.{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}"
                )
        if min(self.size, self.num_global_tokens, self.num_local_tokens) < 1:
            raise UserError(
                f"processor.views: size {self.size}, num_global_tokens {self.num_global_tokens}, num_local_tokens "
                f"{self.num_local_tokens}; expected at least 1 each"
            )
        if self.merge == "spatial" and math.isqrt(self.num_local_tokens) ** 2 != self.num_local_tokens:
            raise UserError(
                f"processor.views.merge is 'spatial' but a crop has {self.num_local_tokens} tokens, which is not a "
                "square number; set merge to flat"
            )
        if self.use == "local" and not self.has_crops:
            raise UserError(
                f"processor.views.use is 'local' but mode {self.mode!r} cuts no crops; set mode (image_aspect_ratio in "
                "a folder's config.json) to anyres"
            )

    @property
    def has_crops(self) -> bool:
        """Whether the model gets crops."""
        return MAX_CROPS[self.mode] > 0 and self.use != "global"

    @property
    def has_global(self) -> bool:
        """Whether the model gets the global view."""
        return self.use != "local"

    @property
    def crops_per_view(self) -> int:
        """C, the number of crops that pass the tower together. Their rows fit into those of a global view."""
        return max(1, min(MAX_BUCKET, self.num_global_tokens // self.num_local_tokens))

    @property
    def most_views(self) -> tuple[int, ...]:
        """The number of views of the largest picture: global ones and buckets of crops, if the model gets them."""
        buckets = -(-MAX_CROPS[self.mode] // self.crops_per_view)
        return (1,) * self.has_global + (buckets,) * self.has_crops

    def num_rows(self, num_crops: int) -> int:
        """Returns the number of rows of a picture, before any is left out."""
        num_global = self.num_global_tokens if self.has_global else 0
        if not self.has_crops:
            return num_global
        return num_global + int(self.has_global) + num_crops * self.num_local_tokens

    def global_view(self, image: Image.Image) -> Image.Image:
        """Returns the global view of an RGB picture, `size` x `size` pixels."""
        if self.mode == "anyres":
            return resize(image, (self.size, self.size))
        padded = image if self.mode == "plain" else transforms.centre_on_square(image)
        return transforms.crop_to_square(padded, self.size, rows_first=True)

    def crops(self, image: Image.Image) -> tuple[list[Image.Image], Size]:
        """Returns the crops of an RGB picture, `size` x `size` pixels each, row by row, and their grid."""
        if self.mode == "anyres":
            return canvas_crops(image, self.size)
        parts, grid = slices(image, self.size) if self.mode == "any_res" else windows(image)
        return [transforms.crop_to_square(part, self.size, rows_first=True) for part in parts], grid

    def first_row(self, number):
        """Returns the index of the first feature row of a crop, or of an array of crops, by its number from 0.

        The rows of the crops of a view come first among its `num_global_tokens` rows.
        """
        view, place = int(self.has_global) + number // self.crops_per_view, number % self.crops_per_view
        return view * self.num_global_tokens + place * self.num_local_tokens

    def layout(self, grid: Size) -> np.ndarray:
        """Returns the layout of a picture, see `Picture.layout`.

        Args:
            grid: columns and rows of the crops.
        """
        per_view = self.num_global_tokens
        parts = [np.arange(per_view)] if self.has_global else []
        if self.has_crops:
            columns, lines = grid
            local = self.first_row(np.arange(columns * lines)[:, None]) + np.arange(self.num_local_tokens)
            if self.merge == "spatial":
                side = math.isqrt(self.num_local_tokens)
                local = local.reshape(lines, columns, side, side).transpose(0, 2, 1, 3)
            parts += [np.array([SEPARATOR])] * self.has_global + [local.reshape(-1)]
        return np.concatenate(parts).astype(np.int32)


def candidate_sizes(size: Size, tile: int) -> list[Size]:
    """Returns the sizes of the canvases among which a picture of this size chooses, in their order."""
    number = max(2, wanted_number(size, tile))
    return [(columns * tile, rows * tile) for columns, rows in grids_near(number)]


def wanted_number(size: Size, tile: int) -> int:
    """Returns the number of tiles with the area of a picture, at most 6."""
    return min(math.ceil(size[0] * size[1] / tile**2), MAX_NUMBER)


def grids_near(number: int) -> list[Size]:
    """Returns all (columns, rows) of `number` cells, of one more and, from 3 on, of one less, by number and columns."""
    first = number - 1 if number > 2 else number
    return [
        (columns, cells // columns)
        for cells in range(first, number + 2)
        for columns in range(1, cells + 1)
        if cells % columns == 0
    ]


def canvas_crops(image: Image.Image, tile: int) -> tuple[list[Image.Image], Size]:
    """Returns the tiles of the black canvas that shows a picture best, and their grid."""
    size = choose_resolution(image.size, candidate_sizes(image.size, tile))
    canvas = fit_on_black(image, size, rows_first=True)
    corners = [(x, y) for y in range(0, canvas.height, tile) for x in range(0, canvas.width, tile)]
    return [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners], (canvas.width // tile, canvas.height // tile)


def slices(image: Image.Image, tile: int) -> tuple[list[Image.Image], Size]:
    """Returns equal slices of a picture, each padded to a square, and their grid, whose aspect is nearest to it."""
    width, height = image.size
    aspect, grids = math.log(width / height), grids_near(wanted_number(image.size, tile))
    columns, rows = min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1]) - aspect))
    boxes = [
        (i * width // columns, j * height // rows, (i + 1) * width // columns, (j + 1) * height // rows)
        for j in range(rows)
        for i in range(columns)
    ]
    return [transforms.centre_on_square(image.crop(box)) for box in boxes], (columns, rows)


def windows(image: Image.Image) -> tuple[list[Image.Image], Size]:
    """Returns 3 x 3 overlapping windows of the padded picture at 1024 x 1024 pixels, and their grid."""
    square = transforms.centre_on_square(image)
    large = resize(square, (LARGE_EDGE, LARGE_EDGE), Image.Resampling.LANCZOS)
    starts = range(0, LARGE_EDGE - WINDOW + 1, STRIDE)
    parts = [large.crop((x, y, x + WINDOW, y + WINDOW)) for y in starts for x in starts]
    return parts, (len(starts), len(starts))
