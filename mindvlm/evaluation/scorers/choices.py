"""Multiple choice: ScienceQA, SEED-Bench and MMMU, and the options of MMBench."""

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDE"
FAILED = "FAILED"


def science_letter(text: str) -> str:
    """Returns the option letter of an answer to ScienceQA, or "FAILED"."""
    if text in LETTERS and len(text) == 1:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[:1]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else FAILED


def science_index(text: str, num_choices: int) -> int:
    """Returns the number of the chosen option, -1 for none of them."""
    letter = science_letter(text)
    return LETTERS.index(letter) if letter in LETTERS[:num_choices] and len(letter) == 1 else -1


def science_prompt(problem: Mapping) -> str:
    """Returns context, question and options in the format CQM-A, as the original question file holds them."""
    context = problem["hint"] or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    text = f"Context: {context}\nQuestion: {problem['question']}\nOptions: {options}\n"
    return text.replace("  ", " ").strip()


def numeric_id(value: object) -> str:
    """Returns the id of a question of SEED-Bench: the original program reads "1_2" as the number 12."""
    try:
        return str(int(value))
    except (TypeError, ValueError):
        return str(value)


def present_options(row: Mapping[str, str], letters: Sequence[str] = "ABCD") -> list[str]:
    """Returns the options of a row of MMBench, up to the first that is missing."""
    options = []
    for letter in letters:
        if is_none(row.get(letter)):
            break
        options.append(row[letter])
    return options


# what pandas reads as a missing value
PANDAS_NONE = set(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")
)


def is_none(value: str | None) -> bool:
    """Whether a cell of a table is missing for the original program, which reads it with pandas."""
    return value is None or value in PANDAS_NONE or value.lower() in ("nan", "none")


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter that an answer to MMMU chooses, None if it chooses none.

    Looked for in turn: "(A)", " A ", and in an answer of more than five words the text of an option. Of several the
    last one in the answer counts.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if any(place >= 0 for place in places.values()):
            return last_of(places)
    if len(text.split()) > 5:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if any(place >= 0 for place in places.values()):
            return last_of(places)
    return None


def last_of(places: Mapping[str, int]) -> str:
    return max(places, key=lambda letter: places[letter])


INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_values(text: str) -> list[str | float]:
    """Returns the texts and numbers that an open answer to MMMU may state."""
    keys = key_phrases(text)
    numbers = [number for key in keys for pattern in NUMBERS for number in re.findall(pattern, key)]
    return list(dict.fromkeys(value for found in (*keys, *numbers) for value in comparable(found)))


def key_phrases(text: str) -> list[str]:
    """Returns the shortest end of each sentence that follows an indicator, or the whole text."""
    text = text.strip().strip(".").lower()
    # the original looks for capitals after it has lowered them, so that only newlines separate sentences
    sentences = text.split("\n")
    phrases = []
    for number, sentence in enumerate(sentences):
        indicators = (*INDICATORS, "=") if number == len(sentences) - 1 else INDICATORS
        tails = [sentence.split(mark)[-1].strip() for mark in indicators if mark in sentence]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            phrases.append(shortest)
    return phrases or [text]


def comparable(text: str) -> list[str | float]:
    """Returns a number with two decimals, or a text in lower case; a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_open_match(text: str, answers: str | Sequence[str]) -> bool:
    """Returns whether an open answer to MMMU contains one of the true texts or equals one of the true numbers."""
    answers = [answers] if isinstance(answers, str) else answers
    truths = [value for answer in answers for value in comparable(answer)]
    for value in open_values(text):
        if isinstance(value, str):
            if any(isinstance(truth, str) and truth in value for truth in truths):
                return True
        elif value in truths:
            return True
    return False
