"""A picture as a model sees it: its views, and the order of their feature rows."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

NEWLINE = -1
"""Entry of a layout: the learned row that ends a line of feature rows."""


@dataclass(frozen=True)
class Picture:
    """A picture, decoded and cut into views once.

    Attributes:
        views: the inputs of the towers: the whole picture, or an overview and tiles. The attributes of a view are
            float32 arrays, one for each vision branch; an array of a branch always has the same shape.
        layout: (R,) int32, the index into the feature rows of all views for each placeholder, or NEWLINE.
        num_fixed: number of first placeholders that a model always keeps; it chooses among the others by the text. None
            if it keeps all.
        features: those of the V views, (V, T, hidden) float32, of a picture that another process has encoded; it has no
            views here.
    """

    views: tuple[Any, ...]
    layout: np.ndarray
    num_fixed: int | None = None
    features: np.ndarray | None = None

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """The SHA-256 of the arrays of each view."""
        return tuple(map(digest_of, self.views))


def digest_of(view: Any) -> bytes:
    # branches may share an array
    arrays = {id(array): array for array in branches_of(view).values()}
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(f"{array.shape} {array.dtype} ".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.digest()


def branches_of(view: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a view by branch."""
    return {branch: array for branch, array in vars(view).items() if array is not None}


@dataclass(frozen=True)
class ShownView:
    """A view as people see it.

    Attributes:
        title: such as "overview".
        image: the part of the picture that the tower sees, RGB.
        first_row: index of its first feature row among those of all views, see `Picture.layout`.
        side: its feature rows are a square of side x side cells.
        place: (column, line) of a tile; None for the whole picture.
    """

    title: str
    image: Image.Image
    first_row: int
    side: int
    place: tuple[int, int] | None = None
