"""What a maker makes."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class MadeSample:
    """A picture with a question and its answer."""

    image: Image.Image
    question: str
    answer: str


def pick(rng: np.random.Generator, items):
    """One of the items."""
    return items[int(rng.integers(len(items)))]
