"""Masks in COCO's run-length encoding, and pictures painted from them.

An encoding has the `size` (height, width) and `counts`: the lengths of runs of pixels outside and inside the mask in
turn, down the columns, the first outside. They are whole numbers, or a text with 5 bits of a number in each character.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mindvlm.processing.samples.public_data import Unusable

FIRST_CHARACTER, MORE, SIGN = 48, 32, 16


def run_lengths(encoding: Any) -> tuple[int, int, list[int]]:
    """Returns height, width and run lengths of an encoding.

    Raises:
        Unusable: it is no encoding, or its runs do not fill its picture exactly.
    """
    try:
        height, width = map(int, encoding["size"])
        counts = encoding["counts"]
        counts = parse_counts(counts) if isinstance(counts, str) else list(counts)
        if not all(type(count) is int for count in counts):
            raise TypeError
    except (TypeError, KeyError, ValueError, OverflowError):
        raise Unusable("a mask is no run-length encoding {'size': [height, width], 'counts': ...}") from None
    if min(height, width, *counts) < 0:
        raise Unusable("a run of a mask has a negative length")
    if sum(counts) != height * width:
        fault = "overrun" if sum(counts) > height * width else "do not fill"
        raise Unusable(f"the runs of a mask {fault} its size")
    return height, width, counts


def parse_counts(text: str) -> list[int]:
    """Returns the run lengths of a text. Raises ValueError if it is damaged.

    Numbers are little-endian and signed. From the fourth on they are differences to the number two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - FIRST_CHARACTER
        if not 0 <= bits < 2 * MORE:
            raise ValueError(f"character {character!r}")
        value |= (bits & ~MORE) << shift
        shift += 5
        if not bits & MORE:
            if bits & SIGN:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the last number has no end")
    return counts


def area(counts: Sequence[int]) -> int:
    """Returns the number of pixels inside a mask."""
    return sum(counts[1::2])


def paint(masks: Sequence[Sequence[int]], colours: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns a picture (height, width, 3) uint8 of masks on black, a later one over those before.

    Args:
        masks: run lengths.
        colours: of each mask, (masks, 3) uint8.
    """
    # the runs are filled in one column-major row of numbers: much quicker than a boolean index for each mask
    numbers = np.zeros(height * width, np.int32)
    for number, counts in enumerate(masks, 1):
        borders = list(accumulate(counts))
        for start, end in zip(borders[::2], borders[1::2], strict=False):
            numbers[start:end] = number
    table = np.concatenate((np.zeros((1, 3), np.uint8), colours))
    return table[numbers.reshape(width, height).T]
