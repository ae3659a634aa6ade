"""Squares of pictures that belong together, cut and changed alike: a picture and its label stay aligned.

A square is brought to its size as the original does: the shortest edge is resized (bilinear), the centre is cut out.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.items import Group, Item
from mindvlm.models.delvm.processor import DelvmProcessor, DelvmProcessorConfig
from mindvlm.processing.samples.public_data import Unusable

Box = tuple[int, int, int, int]
"""left, top, right, bottom"""
CROP = 800
SCALES, RATIOS, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""torchvision's defaults of a random resized crop: share of the area, width / height, and tries until one fits."""


class Source(NamedTuple):
    """Pictures of any size that belong together.

    Attributes:
        name: unique in the task; folders are separated by "/".
        endings: of the names of the pictures.
        load: returns the pictures, all of one size, or raises `Unusable`. Threads call it.
    """

    name: str
    endings: Sequence[str]
    load: Callable[[], Group]


class Cut(NamedTuple):
    """How pictures are divided: the endings of the parts' names, and their boxes for (width, height)."""

    names: Sequence[str]
    boxes: Callable[[int, int], Sequence[Box]]


def whole(width: int, height: int) -> list[Box]:
    return [(0, 0, width, height)]


def six_boxes(width: int, height: int, crop: int = CROP) -> list[Box]:
    """Returns the original's six crops: corners and centres of the two longer borders, or two to a row if upright.

    They are squares of `crop` pixels, or of the shortest edge if that is shorter.
    """
    edge = min(crop, width, height)
    right, bottom = width - edge, height - edge
    # torchvision rounds half a pixel to the even neighbour
    if width >= height:
        corners = [(left, top) for top in (0, bottom) for left in (0, right, round(right / 2))]
    else:
        corners = [(left, top) for top in (0, round(bottom / 2), bottom) for left in (0, right)]
    return [(left, top, left + edge, top + edge) for left, top in corners]


WHOLE = Cut([""], whole)
SIX = Cut([f"_crop{number}" for number in range(1, 7)], six_boxes)


def squares_of(sources: Iterable[Source], cut: Cut, *, size: int, num_copies: int, seed: int) -> list[Item]:
    """Returns the items of square pictures: all parts of each source, then `num_copies` changed copies of all parts.

    Args:
        size: edge of the squares in pixels.
        seed: with the name of the source and the number of the copy, it determines the changes.
    """
    copies = ["", *(f"_copy{number}" for number in range(1, num_copies + 1))]
    endings = [part + copy for copy in copies for part in cut.names]
    items = []
    for source in with_own_names(sources, endings):
        groups = [[source.name + middle + ending for ending in source.endings] for middle in endings]
        items.append(Item(source.name, groups, partial(_load, source, cut, size, num_copies, seed)))
    return items


def with_own_names(sources: Iterable[Source], endings: Sequence[str]) -> Iterator[Source]:
    """Yields the sources, with another name where a square of an earlier one has the name of one of its squares.

    Args:
        endings: of the names of the squares of a source.

    Raises:
        UserError: a name leads out of the folder of the results.
    """
    known: set[str] = set()
    for source in sources:
        parts = source.name.split("/")
        if ".." in parts or not all(parts):
            raise UserError(f"{source.name!r}: the name of a picture leads out of its folder; rename it")
        names = (source.name + f"_{n}" * (n > 1) for n in itertools.count(1))
        name = next(name for name in names if known.isdisjoint(name + ending for ending in endings))
        known.update(name + ending for ending in endings)
        yield source._replace(name=name)


def _load(source: Source, cut: Cut, size: int, num_copies: int, seed: int) -> list[Group]:
    pictures = source.load()
    if len({picture.size for picture in pictures}) != 1:
        raise Unusable("its pictures differ in size")
    parts = [[picture.crop(box) for picture in pictures] for box in cut.boxes(*pictures[0].size)]
    processor = DelvmProcessor(DelvmProcessorConfig(size=size))
    try:
        squares = [[processor.squared(picture) for picture in part] for part in parts]
    except UserError:
        raise Unusable("it is too narrow to be resized") from None
    for number in range(1, num_copies + 1):
        rng = generator(seed, source.name, number)
        squares += [changed(part, rng, size) for part in parts]
    return squares


def generator(seed: int, name: str, number: int = 0) -> np.random.Generator:
    """Returns a generator that depends on the arguments alone."""
    words = np.frombuffer(hashlib.sha256(name.encode(errors="surrogateescape")).digest(), np.uint32)
    return np.random.Generator(np.random.PCG64([seed, number, *map(int, words)]))


def changed(pictures: Group, rng: np.random.Generator, size: int) -> list[Image.Image]:
    """Returns the same random part of all pictures, resized to a square and mirrored or turned by 180 degrees alike."""
    box = random_box(rng, *pictures[0].size)
    # both flips together are the turn
    flips = [flip for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM) if rng.random() < 0.5]
    squares = [picture.crop(box).resize((size, size), Image.Resampling.BILINEAR) for picture in pictures]
    for flip in flips:
        squares = [square.transpose(flip) for square in squares]
    return squares


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
    """Returns a box of random area and aspect ratio within a picture."""
    for _ in range(ATTEMPTS):
        box_area = width * height * rng.uniform(*SCALES)
        ratio = math.exp(rng.uniform(*map(math.log, RATIOS)))
        w, h = round(math.sqrt(box_area * ratio)), round(math.sqrt(box_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # the largest centre of an allowed ratio
    w, h = min(width, round(height * RATIOS[1])), min(height, round(width / RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
