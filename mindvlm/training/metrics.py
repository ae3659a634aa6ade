"""How well text was read."""

from collections.abc import Iterable

import numpy as np


def edit_distance(first: str, second: str) -> int:
    """Least number of insertions, deletions and substitutions between two texts (Levenshtein)."""
    others = code_points(second)
    places = np.arange(len(others) + 1)
    row = places.copy()
    for character in code_points(first):
        kept_or_replaced = row[:-1] + (others != character)
        row[0] += 1
        row[1:] = np.minimum(row[1:] + 1, kept_or_replaced)
        # an insertion comes from the left: the least of everything to the left plus its distance
        row = np.minimum.accumulate(row - places) + places
    return int(row[-1])


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def character_error_rate(texts: Iterable[str], references: Iterable[str]) -> float:
    """Edit distances of all pairs, summed, over the characters of all references (newlines count as characters)."""
    pairs = list(zip(texts, references, strict=True))
    num_characters = sum(len(reference) for _, reference in pairs)
    return sum(edit_distance(text, reference) for text, reference in pairs) / max(num_characters, 1)


def normalized_edit_distance(texts: Iterable[str], references: Iterable[str]) -> float:
    """Mean over all pairs of edit distance / length of the longer text: 0 for equal texts, 1 for nothing in common."""
    pairs = list(zip(texts, references, strict=True))
    shares = [edit_distance(text, reference) / max(len(text), len(reference), 1) for text, reference in pairs]
    return sum(shares) / max(len(shares), 1)
