"""Cutting the empty paper around what is printed, and bringing the rest to a range of aspect ratios."""

import math

import numpy as np
from PIL import Image

MIN_CONTRAST = 24
INK_SHARE_OF_PEAK = 0.35
NEIGHBOURS_OF_INK = 3
MAX_PADDED_PIXELS = 2**26


def paper_colour(image: Image.Image) -> tuple[int, int, int]:
    """The median of each channel: the ground, as long as less than half of the picture is ink."""
    red, green, blue = np.median(np.asarray(image).reshape(-1, 3), axis=0)
    return int(red), int(green), int(blue)


def ink_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) around everything printed in an RGB picture, or None for blank paper."""
    is_ink = ink_mask(image)
    rows, columns = np.flatnonzero(is_ink.any(axis=1)), np.flatnonzero(is_ink.any(axis=0))
    if rows.size == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def ink_mask(image: Image.Image) -> np.ndarray:
    """Where something is printed, (height, width) bool.

    Ink is what differs from the paper by at least 24 of 255 in one channel and by 35 % of the strongest difference, and
    has at least two such pixels beside it: noise, specks of one or two pixels and a tinted ground do not count.

    Args:
        image: RGB.
    """
    paper = np.array(paper_colour(image), dtype=np.int16)
    difference = np.abs(np.asarray(image).astype(np.int16) - paper).max(axis=2)
    contrast = _strongest_of_neighbours(difference)
    is_dark = difference >= max(MIN_CONTRAST, INK_SHARE_OF_PEAK * contrast)
    return is_dark & (_sum_of_neighbours(is_dark) >= NEIGHBOURS_OF_INK)


def trim_margins(image: Image.Image, *, margin: int = 0) -> Image.Image:
    """The picture cut to its ink box plus `margin` pixels where the picture has them; unchanged if there is no ink."""
    box = ink_box(image)
    if box is None:
        return image
    left, top, right, bottom = box
    left, top = max(left - margin, 0), max(top - margin, 0)
    return image.crop((left, top, min(right + margin, image.width), min(bottom + margin, image.height)))


def pad_to_aspect(
    image: Image.Image,
    min_aspect: float,
    *,
    max_aspect: float = math.inf,
    colour: tuple[int, int, int] | None = None,
) -> Image.Image:
    """Adds paper on the right until width / height >= `min_aspect`, or below until it is <= `max_aspect`.

    A picture that would have more than MAX_PADDED_PIXELS then (a tall one beside a wide aspect) is made smaller first.

    Args:
        colour: of the added paper; None takes `paper_colour(image)`, which is wrong for a picture that is mostly ink.
    """
    width, height = padded_size(image, min_aspect, max_aspect)
    if (width, height) == image.size:
        return image
    colour = colour if colour is not None else paper_colour(image)
    if width * height > MAX_PADDED_PIXELS:
        scale = math.sqrt(MAX_PADDED_PIXELS / (width * height))
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        width, height = padded_size(image, min_aspect, max_aspect)
    padded = Image.new("RGB", (width, height), colour)
    padded.paste(image, (0, 0))
    return padded


def padded_size(image: Image.Image, min_aspect: float, max_aspect: float) -> tuple[int, int]:
    """Width and height after `pad_to_aspect`."""
    width = max(image.width, math.ceil(min_aspect * image.height - 1e-6))
    return width, max(image.height, math.ceil(image.width / max_aspect - 1e-6))


def _sum_of_neighbours(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask.astype(np.uint8), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _strongest_of_neighbours(difference: np.ndarray) -> int:
    """The largest value that two pixels side by side or one above the other both reach: one bright speck is not it."""
    beside = np.minimum(difference[:, 1:], difference[:, :-1])
    above = np.minimum(difference[1:], difference[:-1])
    return max((int(pairs.max()) for pairs in (beside, above) if pairs.size), default=0)
