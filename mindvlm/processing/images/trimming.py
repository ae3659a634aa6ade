"""Trimming of pages: margins are cut off, lines of print joined, the aspect ratio is brought into a range."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from mindvlm.core.errors import UserError
from mindvlm.processing.images.transforms import channels

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
        page = Page(image)
        shown = lines_side_by_side(page) if self.lines == "side_by_side" else image
        if shown is image:
            shown = trim_margins(page, margin=self.margin)
        # the trimmed picture may be mostly ink, so the whole one determines the paper colour
        paper = page.paper
        del page  # its masks take as much memory as the picture
        return pad_to_aspect(shown, self.min_aspect, max_aspect=self.max_aspect, colour=paper)


@dataclass(frozen=True)
class Page:
    """A picture of print, whose paper and ink are found once.

    Attributes:
        image: RGB.
    """

    image: Image.Image

    @cached_property
    def paper(self) -> tuple[int, int, int]:
        """The median of each channel, the background if less than half of the picture is ink."""
        num_pixels, counts = self.image.width * self.image.height, self.image.histogram()
        red, green, blue = (_median(counts[first : first + 256], num_pixels) for first in (0, 256, 512))
        return red, green, blue

    @cached_property
    def is_ink(self) -> np.ndarray:
        """A mask of the ink, (height, width) bool.

        An ink pixel differs from the paper by at least 24 of 255 in one channel and by 35 % of the largest difference,
        and has at least two such neighbours. This excludes noise, specks of one or two pixels and a tinted background.
        """
        red, green, blue = self.differences
        # NumPy reduces an axis of three values slowly
        difference = np.maximum(np.maximum(red, green), blue)
        contrast = _strongest_of_neighbours(difference)
        # NumPy compares integers with a float slowly
        is_dark = difference >= max(MIN_CONTRAST, math.ceil(INK_SHARE_OF_PEAK * contrast))
        return is_dark & (_sum_of_neighbours(is_dark) >= NEIGHBOURS_OF_INK)

    @cached_property
    def differences(self) -> list[np.ndarray]:
        """The distance of each pixel from the paper in each channel, (height, width) uint8."""
        return [
            np.abs(channel.astype(np.int16) - value).astype(np.uint8)
            for channel, value in zip(channels(self.image), self.paper, strict=True)
        ]

    def ink_box(self) -> tuple[int, int, int, int] | None:
        """Returns the bounding box (left, top, right, bottom) of the ink; None for a blank picture."""
        rows, columns = np.flatnonzero(self.is_ink.any(axis=1)), np.flatnonzero(self.is_ink.any(axis=0))
        if rows.size == 0:
            return None
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def ink_colour(self) -> tuple[int, int, int]:
        """Returns the colour that differs most from the paper."""
        strongest = int(np.sum(self.differences, axis=0, dtype=np.int16).argmax())
        return self.image.getpixel((strongest % self.image.width, strongest // self.image.width))


def _median(counts: list[int], num_pixels: int) -> int:
    """Returns the median of a histogram; of an even number of pixels the mean of both middle ones, rounded down."""
    sums = list(accumulate(counts))
    return (bisect_right(sums, (num_pixels - 1) // 2) + bisect_right(sums, num_pixels // 2)) // 2


def trim_margins(page: Page, *, margin: int = 0) -> Image.Image:
    """Crops a picture to its ink plus up to `margin` pixels; returns a blank picture unchanged."""
    image, box = page.image, page.ink_box()
    if box is None:
        return image
    left, top, right, bottom = box
    left, top = max(left - margin, 0), max(top - margin, 0)
    return image.crop((left, top, min(right + margin, image.width), min(bottom + margin, image.height)))


def pad_to_aspect(
    image: Image.Image, min_aspect: float, *, max_aspect: float = math.inf, colour: tuple[int, int, int]
) -> Image.Image:
    """Pads on the right until width / height >= `min_aspect`, or below until it is <= `max_aspect`.

    A picture whose result would exceed MAX_PADDED_PIXELS is scaled down first.

    Args:
        colour: colour of the padding.
    """
    width, height = padded_size(image, min_aspect, max_aspect)
    if (width, height) == image.size:
        return image
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
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
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
        is_ink: (height, width) bool, see `Page.is_ink`.
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


def lines_side_by_side(page: Page) -> Image.Image:
    """Arranges the lines of a picture from left to right, cropped, scaled to one height and separated by rules.

    A small model then reads every line at the same height. A picture with fewer than two lines is returned unchanged.
    There must be at least one blank row between lines.
    """
    lines = find_lines(page.is_ink)
    if len(lines) < 2:
        return page.image
    height = max(bottom - top for top, bottom in lines)
    strips = []
    for top, bottom in lines:
        columns = np.flatnonzero(page.is_ink[top:bottom].any(axis=0))
        strip = page.image.crop((int(columns[0]), top, int(columns[-1]) + 1, bottom))
        strips.append(strip.resize((strip.width, height), Image.Resampling.BICUBIC))
    gap, rule = max(1, round(GAP * height)), max(1, round(RULE * height))
    between = 2 * gap + rule
    row = Image.new("RGB", (sum(strip.width for strip in strips) + between * (len(strips) - 1), height), page.paper)
    draw, ink, left = ImageDraw.Draw(row), page.ink_colour(), 0
    for strip in strips:
        if left:
            draw.rectangle((left - gap - rule, 0, left - gap - 1, height - 1), fill=ink)
        row.paste(strip, (left, 0))
        left += strip.width + between
    return row
