"""A picture as a model sees it: its views, and the order of their feature rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

NEWLINE = -1
"""Entry of a layout: the learned row that ends a line of feature rows."""


@dataclass(frozen=True)
class Picture:
    """A picture, decoded and cut into views once.

    Attributes:
        views: the inputs of the towers, as a family's `pixels` returns them: the whole picture, or an overview and
            tiles.
        layout: (R,) int32, the index into the feature rows of all views for each placeholder, or NEWLINE.
    """

    views: tuple[Any, ...]
    layout: np.ndarray
