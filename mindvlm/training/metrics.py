"""How well text was read."""

from collections.abc import Iterable, Sequence


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Least number of insertions, deletions and substitutions between two sequences (Levenshtein)."""
    previous = list(range(len(second) + 1))
    for i, item in enumerate(first, start=1):
        current = [i]
        for j, other in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (item != other)))
        previous = current
    return previous[-1]


def character_error_rate(texts: Iterable[str], references: Iterable[str]) -> float:
    """Edit distances of all pairs, summed, over the characters of all references (newlines count as characters)."""
    pairs = list(zip(texts, references, strict=True))
    num_characters = sum(len(reference) for _, reference in pairs)
    return sum(edit_distance(text, reference) for text, reference in pairs) / max(num_characters, 1)
