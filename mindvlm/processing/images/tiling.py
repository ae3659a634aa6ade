"""A large picture as tiles of the tower's size: the any-resolution scheme of LLaVA-1.6.

Sizes are (width, height) throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.image_span import NEWLINE, ImageRows

Size = tuple[int, int]
Merge = Literal["flat", "spatial", "spatial_unpad"]


@dataclass(kw_only=True)
class TilingConfig:
    """Pictures as an overview and tiles, each as large as the tower's picture.

    Attributes:
        resolutions: [width, height] of what is cut into tiles (`image_grid_pinpoints`); the best one is chosen.
        merge: how the feature rows follow each other behind those of the overview. "flat": tile by tile. "spatial":
            line by line over all tiles. "spatial_unpad": line by line without the black margins, and a learned row
            behind each line.
    """

    resolutions: list[list[int]]
    merge: Merge = "flat"

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise UserError(f"mm_patch_merge_type is {self.merge!r}; expected one of {', '.join(get_args(Merge))}")
        if not self.resolutions or any(len(one) != 2 or min(one) < 1 for one in self.resolutions):
            raise UserError(f"image_grid_pinpoints are {self.resolutions}; expected at least one [width, height]")

    @property
    def sizes(self) -> list[Size]:
        """The resolutions as tuples."""
        return [(width, height) for width, height in self.resolutions]

    def check(self, tile: int, num_tokens: int) -> None:
        """Raises UserError where the resolutions are no multiples of a tile, or its tokens no square to be merged."""
        odd = next((size for size in self.resolutions if size[0] % tile or size[1] % tile), None)
        if odd:
            raise UserError(f"image_grid_pinpoints: {odd} is no multiple of the tower's picture of {tile} pixels")
        if self.merge != "flat" and math.isqrt(num_tokens) ** 2 != num_tokens:
            raise UserError(
                f"mm_patch_merge_type is {self.merge!r} but an image has {num_tokens} tokens, which are no square of "
                "patches; set it to flat"
            )

    def tiles(self, image: Image.Image, tile: int) -> list[Image.Image]:
        """Overview and tiles of a picture, each tile x tile pixels."""
        return tiles(image, self.sizes, tile=tile, overview=(tile, tile))

    def image_rows(self, size: Size, *, tile: int, num_tokens: int) -> ImageRows:
        """The feature rows that stand for a picture of that size.

        Args:
            tile: edge of the tower's picture in pixels.
            num_tokens: feature rows of it.
        """
        columns, lines = grid_shape(size, self.sizes, tile)
        num_views = 1 + columns * lines
        rows = np.arange(num_views * num_tokens, dtype=np.int32)
        if self.merge == "flat":
            return ImageRows(num_views, rows)
        side = math.isqrt(num_tokens)
        grid = rows[num_tokens:].reshape(lines, columns, side, side).transpose(0, 2, 1, 3)
        grid = grid.reshape(lines * side, columns * side)
        if self.merge == "spatial_unpad":
            grid = without_margins(grid, size)
            grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return ImageRows(num_views, np.concatenate((rows[:num_tokens], grid.reshape(-1))))


def without_margins(grid: np.ndarray, size: Size) -> np.ndarray:
    """The lines and columns of a grid (height, width) that show the picture which `fit_on_black` put on it.

    Args:
        size: of the picture.
    """
    height, width = grid.shape
    if size[0] / size[1] > width / height:
        margin = (height - int(size[1] * (width / size[0]))) // 2
        return grid[margin : height - margin]
    margin = (width - int(size[0] * (height / size[1]))) // 2
    return grid[:, margin : width - margin]


def choose_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of the picture's pixels and, of several, wastes fewest of its own.

    Raises:
        UserError: there is none to choose from.
    """
    if not resolutions:
        raise UserError("image_grid_pinpoints is empty; give at least one [width, height]")

    def fit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        shown = int(size[0] * scale) * int(size[1] * scale)
        effective = min(shown, size[0] * size[1])
        return effective, effective - resolution[0] * resolution[1]

    return tuple(max(resolutions, key=fit))


def fit_on_black(image: Image.Image, size: Size) -> Image.Image:
    """The whole picture, as large as it fits, in the middle of a black one of that size."""
    scale_x, scale_y = size[0] / image.width, size[1] / image.height
    if scale_x < scale_y:
        fitted = (size[0], min(math.ceil(image.height * scale_x), size[1]))
    else:
        fitted = (min(math.ceil(image.width * scale_y), size[0]), size[1])
    black = Image.new("RGB", size)
    resized = image.resize(fitted)
    black.paste(resized, ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2))
    return black


def grid_shape(size: Size, resolutions: Sequence[Size], tile: int) -> Size:
    """Tiles in a row and in a column of a picture of that size."""
    width, height = choose_resolution(size, resolutions)
    return width // tile, height // tile


def tiles(image: Image.Image, resolutions: Sequence[Size], *, tile: int, overview: Size) -> list[Image.Image]:
    """The whole picture at the size `overview`, then the tiles of its best resolution row by row.

    Args:
        tile: edge of a tile; resolutions are multiples of it.
    """
    large = fit_on_black(image, choose_resolution(image.size, resolutions))
    corners = [(x, y) for y in range(0, large.height, tile) for x in range(0, large.width, tile)]
    return [image.resize(overview)] + [large.crop((x, y, x + tile, y + tile)) for x, y in corners]
