"""A large picture as tiles of the tower's size: the any-resolution scheme of LLaVA-1.6.

Sizes are (width, height) throughout.
"""

import math
from collections.abc import Sequence

from PIL import Image

from mindvlm.errors import UserError

Size = tuple[int, int]


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
