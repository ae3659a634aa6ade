"""Lines of print laid side by side, so that a small model meets every line at the same height."""

import numpy as np
from PIL import Image, ImageDraw

from mindvlm.processing.images.margins import ink_mask, paper_colour

# Rows of ink lower than this are dots, dashes and accents, not lines; print of 14 pixels has an x-height of 8.
MIN_LINE_HEIGHT = 7
MIN_SHARE_OF_TALLEST = 0.3
# In heights of a line; the rule is wider than the stroke of any letter.
GAP, RULE = 0.25, 0.3


def find_lines(is_ink: np.ndarray) -> list[tuple[int, int]]:
    """(top, bottom) of each line of print: runs of rows with ink, low ones joined to the nearest line.

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
    """The lines of a picture from left to right, each cut to its ink and brought to one height, a rule between them.

    A picture with one line or none is returned as it is.

    Args:
        image: RGB, lines parted by at least one row of blank paper.
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
    """The colour that differs most from the paper."""
    pixels = np.asarray(image).reshape(-1, 3)
    strongest = np.abs(pixels.astype(np.int16) - np.array(paper, dtype=np.int16)).sum(axis=1).argmax()
    red, green, blue = pixels[strongest]
    return int(red), int(green), int(blue)
