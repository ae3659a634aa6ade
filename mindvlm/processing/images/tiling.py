"""Tiling of large pictures: the any-resolution scheme of LLaVA-1.6.

Sizes are (width, height).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.picture import NEWLINE
from mindvlm.processing.images.transforms import resize

Size = tuple[int, int]
Merge = Literal["flat", "spatial", "spatial_unpad"]


@dataclass(kw_only=True)
class TilingConfig:
    """Cuts pictures into an overview and tiles of the tower's size.

    Attributes:
        resolutions: candidate sizes [width, height] of the tiled picture (`image_grid_pinpoints`).
        merge: order of the feature rows after those of the overview. "flat": tile by tile. "spatial": line by line over
            all tiles. "spatial_unpad": line by line without the black margins, with a learned row after each line.
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
        """Raises UserError if a resolution is not a multiple of the tile, or tokens to be merged form no square."""
        odd = next((size for size in self.resolutions if size[0] % tile or size[1] % tile), None)
        if odd:
            raise UserError(f"image_grid_pinpoints: {odd} is not a multiple of the tower's image size of {tile} pixels")
        if self.merge != "flat" and math.isqrt(num_tokens) ** 2 != num_tokens:
            raise UserError(
                f"mm_patch_merge_type is {self.merge!r} but an image has {num_tokens} tokens, which is not a "
                "square number; set it to flat"
            )

    def most_views(self, tile: int) -> int:
        """Returns the number of views of the largest picture, the overview included."""
        return 1 + max(width // tile * (height // tile) for width, height in self.resolutions)

    def tiles(self, image: Image.Image, tile: int) -> list[Image.Image]:
        """Returns the overview and the tiles of a picture, tile x tile pixels each."""
        return tiles(image, self.sizes, tile=tile, overview=(tile, tile))

    def layout(self, size: Size, *, tile: int, num_tokens: int) -> np.ndarray:
        """Returns the layout of a picture, see `Picture.layout`.

        Args:
            size: size of the picture.
            tile: edge of a tile in pixels.
            num_tokens: feature rows per view.
        """
        columns, lines = grid_shape(size, self.sizes, tile)
        rows = np.arange((1 + columns * lines) * num_tokens, dtype=np.int32)
        if self.merge == "flat":
            return rows
        side = math.isqrt(num_tokens)
        grid = rows[num_tokens:].reshape(lines, columns, side, side).transpose(0, 2, 1, 3)
        grid = grid.reshape(lines * side, columns * side)
        if self.merge == "spatial_unpad":
            grid = without_margins(grid, size)
            grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate((rows[:num_tokens], grid.reshape(-1)))


def without_margins(grid: np.ndarray, size: Size) -> np.ndarray:
    """Removes from a grid (height, width) the margins that `fit_on_black` added.

    Args:
        size: size of the picture.
    """
    height, width = grid.shape
    if size[0] / size[1] > width / height:
        margin = (height - int(size[1] * (width / size[0]))) // 2
        return grid[margin : height - margin]
    margin = (width - int(size[0] * (height / size[1]))) // 2
    return grid[:, margin : width - margin]


def choose_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """Returns the resolution that keeps the most pixels of the picture; on ties, the one with the least unused area.

    Raises:
        UserError: there are no resolutions.
    """
    if not resolutions:
        raise UserError("image_grid_pinpoints is empty; give at least one [width, height]")

    def fit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        shown = int(size[0] * scale) * int(size[1] * scale)
        effective = min(shown, size[0] * size[1])
        return effective, effective - resolution[0] * resolution[1]

    return tuple(max(resolutions, key=fit))


def fit_on_black(image: Image.Image, size: Size, *, rows_first: bool = False) -> Image.Image:
    """Scales a picture to fit and centres it on a black one of the given size; `rows_first` as in `resize`."""
    scale_x, scale_y = size[0] / image.width, size[1] / image.height
    if scale_x < scale_y:
        fitted = (size[0], min(math.ceil(image.height * scale_x), size[1]))
    else:
        fitted = (min(math.ceil(image.width * scale_y), size[0]), size[1])
    black = Image.new("RGB", size)
    resized = resize(image, fitted, rows_first=rows_first)
    black.paste(resized, ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2))
    return black


def grid_shape(size: Size, resolutions: Sequence[Size], tile: int) -> Size:
    """Returns the number of tiles per row and per column for a picture of that size."""
    width, height = choose_resolution(size, resolutions)
    return width // tile, height // tile


def tiles(image: Image.Image, resolutions: Sequence[Size], *, tile: int, overview: Size) -> list[Image.Image]:
    """Returns the whole picture at the size `overview`, then the tiles of its best resolution row by row.

    Args:
        tile: edge of a tile; divides the resolutions.
    """
    large = fit_on_black(image, choose_resolution(image.size, resolutions))
    corners = [(x, y) for y in range(0, large.height, tile) for x in range(0, large.width, tile)]
    return [image.resize(overview)] + [large.crop((x, y, x + tile, y + tile)) for x, y in corners]
