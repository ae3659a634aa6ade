"""Trimming of pages: margins are cut off, lines of print joined, the aspect ratio is brought into a range."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from mindvlm.core.errors import UserError

MIN_CONTRAST = 24
INK_SHARE_OF_PEAK = 0.35
NEIGHBOURS_OF_INK = 3
MAX_PADDED_PIXELS = 2**26
# Lower runs of rows are dots, dashes and accents, not lines; 14-pixel print has an x-height of 8.
MIN_LINE_HEIGHT = 7
MIN_SHARE_OF_TALLEST = 0.3
# In line heights; the rule is wider than the stroke of any letter.
GAP, RULE = 0.25, 0.3


@dataclass(kw_only=True)
class TrimConfig:
    """Cuts empty margins, then pads on the right or below to keep the aspect ratio within a range.

    Attributes:
        lines: "side_by_side" joins several lines of print into one, see `lines_side_by_side`.
        margin: pixels to keep around the ink.
        min_aspect, max_aspect: range of width / height.
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
        """Returns the trimmed and padded picture."""
        shown = lines_side_by_side(image) if self.lines == "side_by_side" else image
        if shown is image:
            shown = trim_margins(image, margin=self.margin)
        # the trimmed picture may be mostly ink, so the whole one determines the paper colour
        return pad_to_aspect(shown, self.min_aspect, max_aspect=self.max_aspect, colour=paper_colour(image))


def paper_colour(image: Image.Image) -> tuple[int, int, int]:
    """Returns the median of each channel, the background if less than half of the picture is ink."""
    # of an even number of pixels the mean of both middle ones, rounded down
    middle = [(image.width * image.height - 1) // 2, image.width * image.height // 2]
    counts = np.cumsum(np.array(image.histogram()).reshape(3, 256), axis=1)
    red, green, blue = (int(np.searchsorted(channel, middle, side="right").sum()) // 2 for channel in counts)
    return red, green, blue


def ink_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Returns the bounding box (left, top, right, bottom) of the ink of an RGB picture; None for a blank one."""
    is_ink = ink_mask(image)
    rows, columns = np.flatnonzero(is_ink.any(axis=1)), np.flatnonzero(is_ink.any(axis=0))
    if rows.size == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def ink_mask(image: Image.Image) -> np.ndarray:
    """Returns a mask of the ink of a picture, (height, width) bool.

    An ink pixel differs from the paper by at least 24 of 255 in one channel and by 35 % of the largest difference, and
    has at least two such neighbours. This excludes noise, specks of one or two pixels and a tinted background.

    Args:
        image: RGB.
    """
    red, green, blue = differences(image, paper_colour(image))
    difference = np.maximum(np.maximum(red, green), blue)
    contrast = _strongest_of_neighbours(difference)
    is_dark = difference >= max(MIN_CONTRAST, INK_SHARE_OF_PEAK * contrast)
    return is_dark & (_sum_of_neighbours(is_dark) >= NEIGHBOURS_OF_INK)


def differences(image: Image.Image, colour: tuple[int, int, int]) -> list[np.ndarray]:
    """Returns the distance of each pixel from a colour in each channel, (height, width) int16."""
    # NumPy reduces an axis of three values slowly
    return [
        np.abs(np.asarray(band).astype(np.int16) - value) for band, value in zip(image.split(), colour, strict=True)
    ]


def trim_margins(image: Image.Image, *, margin: int = 0) -> Image.Image:
    """Crops a picture to its ink plus up to `margin` pixels; returns a blank picture unchanged."""
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
    """Pads on the right until width / height >= `min_aspect`, or below until it is <= `max_aspect`.

    A picture whose result would exceed MAX_PADDED_PIXELS is scaled down first.

    Args:
        colour: colour of the padding; None for `paper_colour(image)`, which is wrong if the picture is mostly ink.
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
    """Returns width and height after `pad_to_aspect`."""
    width = max(image.width, math.ceil(min_aspect * image.height - 1e-6))
    return width, max(image.height, math.ceil(image.width / max_aspect - 1e-6))


def _sum_of_neighbours(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask.astype(np.uint8), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _strongest_of_neighbours(difference: np.ndarray) -> int:
    """Returns the largest value that two adjacent pixels both reach, which excludes single specks."""
    beside = np.minimum(difference[:, 1:], difference[:, :-1])
    above = np.minimum(difference[1:], difference[:-1])
    return max((int(pairs.max()) for pairs in (beside, above) if pairs.size), default=0)


def find_lines(is_ink: np.ndarray) -> list[tuple[int, int]]:
    """Returns (top, bottom) of each line of print: runs of rows with ink; low runs are joined to the nearest line.

    Args:
        is_ink: (height, width) bool, see `ink_mask`.
    """
    has_ink = np.concatenate([[False], is_ink.any(axis=1), [False]])
    edges = np.flatnonzero(has_ink[1:] != has_ink[:-1]).reshape(-1, 2)
    runs = [(int(top), int(bottom)) for top, bottom in edges]
    tallest = max((bottom - top for top, bottom in runs), default=0)
    least = max(MIN_LINE_HEIGHT, MIN_SHARE_OF_TALLEST * tallest)
    lines = [list(run) for run in runs if run[1] - run[0] >= least]
    if not lines:
        return [(runs[0][0], runs[-1][1])] if runs else []
    for top, bottom in runs:
        nearest = min(lines, key=lambda line: max(line[0] - bottom, top - line[1]))
        nearest[:] = min(nearest[0], top), max(nearest[1], bottom)
    return [(top, bottom) for top, bottom in lines]


def lines_side_by_side(image: Image.Image) -> Image.Image:
    """Arranges the lines of a picture from left to right, cropped, scaled to one height and separated by rules.

    A small model then reads every line at the same height. A picture with fewer than two lines is returned unchanged.

    Args:
        image: RGB, with at least one blank row between lines.
    """
    is_ink = ink_mask(image)
    lines = find_lines(is_ink)
    if len(lines) < 2:
        return image
    height = max(bottom - top for top, bottom in lines)
    strips = []
    for top, bottom in lines:
        columns = np.flatnonzero(is_ink[top:bottom].any(axis=0))
        strip = image.crop((int(columns[0]), top, int(columns[-1]) + 1, bottom))
        strips.append(strip.resize((strip.width, height), Image.Resampling.BICUBIC))
    paper = paper_colour(image)
    gap, rule = max(1, round(GAP * height)), max(1, round(RULE * height))
    between = 2 * gap + rule
    row = Image.new("RGB", (sum(strip.width for strip in strips) + between * (len(strips) - 1), height), paper)
    draw, left = ImageDraw.Draw(row), 0
    for strip in strips:
        if left:
            draw.rectangle((left - gap - rule, 0, left - gap - 1, height - 1), fill=ink_colour(image, paper))
        row.paste(strip, (left, 0))
        left += strip.width + between
    return row


def ink_colour(image: Image.Image, paper: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the colour that differs most from the paper."""
    strongest = int(sum(differences(image, paper)).argmax())
    return image.getpixel((strongest % image.width, strongest // image.width))
