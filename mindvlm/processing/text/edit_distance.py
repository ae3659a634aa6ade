"""Edit distances of texts, for evaluation during and after training."""

from collections.abc import Iterable

from rapidfuzz.distance import Levenshtein


def character_error_rate(texts: Iterable[str], references: Iterable[str]) -> float:
    """Returns the summed Levenshtein distance of all pairs over the characters of all references (newlines count)."""
    pairs = list(zip(texts, references, strict=True))
    num_characters = sum(len(reference) for _, reference in pairs)
    return sum(Levenshtein.distance(*pair) for pair in pairs) / max(num_characters, 1)


def normalized_edit_distance(texts: Iterable[str], references: Iterable[str]) -> float:
    """Returns the mean over all pairs of Levenshtein distance / length of the longer text, from 0 (equal) to 1."""
    shares = [Levenshtein.normalized_distance(*pair) for pair in zip(texts, references, strict=True)]
    return sum(shares) / max(len(shares), 1)
