"""AMBER (junyangwang0410/AMBER): hallucinations in descriptions and in answers to questions of yes or no.

Every counter of the official program starts at 0.001, so that an empty one can divide, and figures are rounded to one
decimal before they are combined. Both are part of the metric.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

START = 0.001
# dimension -> the types of its questions; the official program counts all other types as relations
ATTRIBUTES = {kind: f"discriminative-attribute-{kind}" for kind in ("state", "number", "action")}
EXISTENCE = "discriminative-hallucination"


def dimensions_of(kind: str) -> list[str]:
    """Returns the rows of the official table that count a question of a type."""
    if kind == EXISTENCE:
        return ["discriminative", "existence"]
    names = [name for name, full in ATTRIBUTES.items() if full == kind]
    return ["discriminative", *(["attribute", *names] if names else ["relation"])]


def answer_figures(pairs: Mapping[tuple[str, str], int], dimension: str = "") -> dict[str, float]:
    """Returns accuracy, precision, recall and F1 in percent of the answers of a dimension.

    Precision and recall are those of the answer "No". Any response but "Yes" and "No" is wrong.

    Args:
        pairs: response and truth ("yes" or "no") -> their number.
        dimension: a row of the official table.
    """
    # the official program adds the counters of the three kinds of attribute, and smooths one F1 differently
    start = START * (len(ATTRIBUTES) if dimension == "attribute" else 1)
    smoothing = 0.001 if dimension == "existence" else 0.0001
    total = sum(pairs.values())
    both = pairs.get(("No", "no"), 0)
    correct = both + pairs.get(("Yes", "yes"), 0)
    num_no = sum(count for (response, _), count in pairs.items() if response == "No")
    num_true_no = sum(count for (_, truth), count in pairs.items() if truth != "yes")
    accuracy = round(correct / (total + start) * 100, 1)
    precision = round(both / (num_no + start) * 100, 1)
    recall = round(both / (num_true_no + start) * 100, 1)
    f1 = 2 * (precision / 100) * (recall / 100) / ((precision / 100) + (recall / 100) + smoothing)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": round(f1 * 100, 1)}


@dataclass(frozen=True)
class Mentions:
    """Counts of a description: nouns in all and hallucinated, and the annotated words in all and mentioned."""

    nouns: int
    hallucinated: int
    truths: int
    covered: int
    traps: int
    trapped: int


def mentions(
    nouns: Iterable[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    *,
    association: Mapping[str, Sequence[str]],
    safe_words: Iterable[str],
    is_similar: Callable[[str, str], bool],
) -> Mentions:
    """Compares the nouns of a description with the annotation of its picture.

    Args:
        nouns: lemmas of the nouns, in order.
        truth: words for what the picture shows.
        hallu: words for what models imagine in it.
        association: word -> words that stand for it.
        safe_words: nouns that are never a hallucination.
        is_similar: whether a noun means the same as another word.
    """
    vocabulary = {*association, *(word for words in association.values() for word in words)}
    nouns, ignored = [noun for noun in nouns if noun in vocabulary], set(safe_words)
    marks = {"truth": [0] * len(truth), "hallu": [0] * len(hallu)}
    words = {"truth": places(truth, association), "hallu": places(hallu, association)}

    def mark(kind: str, matches: Callable[[str], bool]) -> bool:
        """Marks the annotated word that the first match stands for; returns whether there is one."""
        place = next((place for word, place in words[kind] if matches(word)), None)
        if place is not None:
            marks[kind][place] = 1
        return place is not None

    hallucinated = 0
    for noun in nouns:
        if noun in ignored or mark("truth", noun.__eq__):
            continue
        mark("hallu", noun.__eq__)
        mark("hallu", lambda word, noun=noun: is_similar(noun, word))
        hallucinated += not mark("truth", lambda word, noun=noun: is_similar(noun, word))
    return Mentions(len(nouns), hallucinated, len(truth), sum(marks["truth"]), len(hallu), sum(marks["hallu"]))


def places(annotated: Sequence[str], association: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """Returns the words that stand for annotated words, then these themselves, with the place of the latter."""
    pairs = [(word, place) for place, name in enumerate(annotated) for word in association[name]]
    return pairs + [(name, place) for place, name in enumerate(annotated)]


def description_figures(found: Mapping[Mentions, int]) -> dict[str, float]:
    """Returns CHAIR, Cover, Hal and Cog in percent of descriptions -> their number."""

    def share(part: Callable[[Mentions], int], whole: Callable[[Mentions], int]) -> float:
        parts, wholes = (sum(of(one) * count for one, count in found.items()) for of in (part, whole))
        return parts / (wholes + START) * 100

    return {
        "chair": round(share(lambda one: one.hallucinated, lambda one: one.nouns), 1),
        "cover": round(share(lambda one: one.covered, lambda one: one.truths), 1),
        "hal": round(100 - share(lambda one: not one.hallucinated, lambda one: 1), 1),
        "cog": round(share(lambda one: one.trapped, lambda one: one.traps), 1),
    }
