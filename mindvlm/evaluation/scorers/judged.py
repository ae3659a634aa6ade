"""Requests to judges and the scores in their replies: LLaVA-Bench, MMHal-Bench and MathVerse."""

import re
from collections.abc import Mapping, Sequence

LLAVA_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
NO_SCORES = (-1.0, -1.0)
# of MMHal-Bench; a rating below it is a hallucination
FAITHFUL_RATING = 3
NUM_QUESTION_TYPES = 8


def review_request(question: str, context: str | Sequence[str], answers: Sequence[str], rule: Mapping) -> dict:
    """Returns the request to compare a reference answer with another one, as LLaVA-Bench asks it."""
    context = context if isinstance(context, str) else "\n".join(context)
    parts = [f"[Context]\n{context}", f"[Question]\n{question}"]
    for number, answer in enumerate(answers, 1):
        role = f"{rule['role']} {number}"
        parts += [f"[{role}]\n{answer}", f"[End of {role}]"]
    text = "\n\n".join([*parts, f"[System]\n{rule['prompt']}"]) + "\n\n"
    messages = [{"role": "system", "content": LLAVA_SYSTEM}, {"role": "user", "content": text}]
    return {"messages": messages, "temperature": 0.2, "max_tokens": 1024}


def review_scores(reply: str) -> tuple[float, float] | None:
    """Returns the two numbers in the first line of a review, None if it has another form.

    As in the original, they are separated by exactly one space or comma.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    return first, second


def review_figures(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns the ratio of the mean scores in percent, and ten times each mean, which the original rounds first."""
    reference, model = (round(sum(column) / len(scores), 3) for column in zip(*scores, strict=True))
    return {
        "ratio": 100 * model / reference if reference else float("nan"),
        "reference": 10 * reference,
        "model": 10 * model,
    }


def hallucination_rating(reply: str) -> int | None:
    """Returns the rating 0 to 6 in a review of MMHal-Bench, None unless there is exactly one."""
    found = [rating for rating in range(7) if f"rating: {rating}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def extracted(reply: str) -> str:
    """Returns the answer that a judge of MathVerse extracted."""
    return reply.replace("Extracted Answer: ", "").strip()


def judgement(reply: str) -> bool | None:
    """Returns the judgement 0 or 1 in a reply for MathVerse, None for another reply."""
    return {"0": False, "1": True}.get(re.sub("Judgement:", "", reply).strip())
