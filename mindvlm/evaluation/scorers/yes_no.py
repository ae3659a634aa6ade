"""Answers of yes or no: POPE and MME."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# the coarse perception that SliME reports as MME-H
HALLUCINATION = PERCEPTION[:4]


def ratio(part: float, whole: float) -> float:
    """Returns part / whole, NaN for an empty whole."""
    return part / whole if whole else math.nan


def pope_answer(text: str) -> str:
    """Returns "no" if the first sentence has the word "No", "no" or "not", else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


@dataclass
class Confusion:
    """Counts of answers; positive is "yes"."""

    true_positives: int = 0
    false_positives: int = 0
    true_negatives: int = 0
    false_negatives: int = 0

    @classmethod
    def of(cls, pairs: Mapping[tuple[str, str], int]) -> "Confusion":
        """Returns the counts of pairs of answer and label."""
        kinds = (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))
        return cls(*(pairs.get(kind, 0) for kind in kinds))

    def figures(self) -> dict[str, float]:
        """Returns accuracy, precision, recall, F1 and the share of "yes", 0 to 1; NaN for what is not defined."""
        positives = self.true_positives + self.false_positives
        total = positives + self.true_negatives + self.false_negatives
        precision = ratio(self.true_positives, positives)
        recall = ratio(self.true_positives, self.true_positives + self.false_negatives)
        return {
            "accuracy": ratio(self.true_positives + self.true_negatives, total),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives),
            "yes_ratio": ratio(positives, total),
        }


def mme_answer(text: str) -> str:
    """Returns "yes", "no" or "other": the whole text, or else what is found in its first four characters."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((answer for answer in ("yes", "no") if answer in text[:4]), "other")


def mme_score(verdicts: Sequence[tuple[str, bool, int]]) -> float:
    """Returns the score of a task, 0 to 200: accuracy plus the share of pictures with only right answers, in percent.

    Args:
        verdicts: picture, whether the answer is right, and how often the picture counts, for each question.
    """
    pictures: dict[str, tuple[bool, int]] = {}
    for picture, is_right, count in verdicts:
        pictures[picture] = (pictures.get(picture, (True, count))[0] and is_right, count)
    accuracy = sum(count for _, is_right, count in verdicts if is_right) / sum(count for *_, count in verdicts)
    right = sum(count for is_right, count in pictures.values() if is_right)
    return 100 * accuracy + 100 * right / sum(count for _, count in pictures.values())


def mme_totals(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums of the tasks' scores that papers report."""
    groups = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
    return {
        name: sum(scores[task] for task in tasks if task in scores)
        for name, tasks in groups.items()
        if any(task in scores for task in tasks)
    }
