"""Short free answers: the normalisation of EvalAI, the accuracy of TextVQA, and the relaxed accuracy of ChartQA."""

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`!'
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
# words whose only misspelling lacks all apostrophes
PLAIN = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
)
# words whose misspellings lack one of their apostrophes
DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've y'all'd've"
)
OTHER = {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "somebody'd": "somebodyd"}


def contraction_map() -> dict[str, str]:
    """Returns misspelt -> spelt contraction, as far as a key can occur after lowering."""
    found = {word.replace("'", ""): word for word in PLAIN.split()} | OTHER
    for word in DOUBLE.split():
        for place in (place for place, letter in enumerate(word) if letter == "'"):
            found[word[:place] + word[place + 1 :]] = word
    return found


CONTRACTIONS = contraction_map()


def normalised(text: str) -> str:
    """Returns an answer as EvalAI's processor for VQA normalises it.

    Two slips of the original are part of the metric: every full stop that no digit follows is deleted, at most 32 of
    them, and whether a mark is deleted or becomes a space depends on the text before any mark was changed.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in MARKS:
        touches_space = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if touches_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Returns the score of each distinct normalised human answer.

    It is the mean over annotators of min(1, matches among the others / 3).
    """
    given = [normalised(answer) for answer in answers]
    return {
        answer: sum(
            min(1.0, sum(other == answer for j, other in enumerate(given) if j != i) / 3) for i in range(len(given))
        )
        / len(given)
        for answer in dict.fromkeys(given)
    }


def textvqa_score(text: str, answers: Sequence[str]) -> float:
    """Returns the soft accuracy of an answer, 0 to 1."""
    return answer_scores(answers).get(normalised(text), 0.0)


def question_of_prompt(prompt: str) -> str:
    """Returns the lower-case question in a prompt of TextVQA. Raises ValueError if the prompt has another form."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if not found:
            raise ValueError(f"no question in the prompt {prompt!r}")
        return found.group(1).lower()
    lines = prompt.split("\n")
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"no question in the prompt {prompt!r}")


def gqa_answer(text: str) -> str:
    """Returns an answer as GQA's predictions hold it."""
    return text.rstrip(".").lower()


def relaxed_match(answer: str, truth: str) -> bool:
    """Returns whether an answer is a number within 5 % of the truth, or else the same text but for case.

    The relaxed accuracy of ChartQA (Masry et al. 2022). A true zero is compared as text, as in the original.
    """
    value, expected = as_number(answer), as_number(truth)
    if value is not None and expected:
        return abs(value - expected) / abs(expected) <= 0.05
    return answer.lower() == truth.lower()


def as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
