"""Answers to MathVista and MathVision."""

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def quick_extraction(text: str, *, question_type: str, answer_type: str, choices: Sequence[str] | None) -> str | None:
    """Returns the answer to MathVista that a response consists of, None if a judge has to extract it."""
    if text == "":
        return ""
    if question_type == "multi_choice" and text in (choices or ()):
        return text
    try:
        if answer_type == "integer":
            return str(int(text))
        if answer_type == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def mathvista_answer(
    extraction: str, *, question_type: str, answer_type: str, choices: Sequence[str] | None, precision: float | None
) -> str | None:
    """Returns an extracted answer in the form of the true answers of MathVista; None if it has another type."""
    if question_type == "multi_choice":
        extraction = extraction.strip()
        if letter := re.search(r"\(([a-zA-Z])\)", extraction):
            extraction = letter[1].upper()
        number = ord(extraction) - ord("A") if len(extraction) == 1 else -1
        if 0 <= number < len(choices):
            return choices[number]
        return min(choices, key=lambda choice: Levenshtein.distance(extraction, choice))
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(precision)))
    except (ValueError, OverflowError, TypeError):
        return None
    return extraction


LEAD_INS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")


def mathvision_answer(response: str) -> str:
    """Returns the answer in a response to MathVision, in lower case and without LaTeX that carries no value."""
    text = response.strip()
    for letter in "ABCDE":
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith(starts):
            text = letter
    if is_number(tail := text.split("is ")[-1].rstrip(".")):
        text = tail
    if "oxed{" not in text:
        for lead_in in LEAD_INS:
            for form in (lead_in, lead_in.replace("the", "The")):
                if form in text:
                    text = text.split(form)[-1].strip().split("\n")[0].split(". ")[0]
                else:
                    text = text.strip()
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = boxed_value(text)
    for letter in "abcde":
        text = text.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    return text.rstrip(".").lstrip(":").strip()


# applied in this order
MEANINGLESS = (
    (" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""), ("\\text", ""),
    ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
    ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""), ("{km}", ""), ("km", ""),
)  # fmt: skip
DECORATION = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""),
)  # fmt: skip


def boxed_value(text: str) -> str:
    """Returns what the last box of a text holds, or the text, reduced to its value."""
    text = text.lower().replace("{}", "")
    found = re.findall("oxed{(.*)}", text, re.DOTALL)
    value = found[-1] if found else text
    closing, opening = value.find("}"), value.find("{")
    if closing >= 0 and (opening < 0 or closing < opening):
        value = value.split("}")[0]
    value = value.split("=")[-1].split("\\approx")[-1]
    return plain_latex(replaced(value, MEANINGLESS))


def plain_latex(text: str) -> str:
    """Returns LaTeX without decoration, with braces around arguments and fractions in one form."""
    text = replaced(text, DECORATION).split("\\text{ ")[0]
    text = replaced(text, (("\\%", ""), (" .", " 0."), ("{.", "{0.")))
    if not text:
        return text
    if text.startswith("."):
        text = f"0{text}"
    for mark in ("=", "\\approx"):
        if text.count(mark) == 1:
            text = text.split(mark)[1]
    if "sqrt" in text:
        text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    if "sqrt" in text:
        text = braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    if fraction := re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text):
        return f"\\frac{{{fraction[1]}}}{{{fraction[2]}}}"
    return text


def braced_fractions(text: str) -> str:
    """Returns LaTeX in which arguments of \\frac that are single characters have braces."""
    first, *rest = text.split("\\frac")
    for piece in rest:
        if not piece.startswith("{"):
            if len(piece) < 2:
                return text
            denominator = piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}"
            piece = f"{{{piece[0]}}}{denominator}"
        first += f"\\frac{piece}"
    return first


def replaced(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def is_equal_answer(first: str, second: str) -> bool:
    """Returns whether two answers to MathVision are the same text or the same value to two decimals."""
    first, second = first.lower(), second.lower()
    if not first.strip() or not second.strip():
        return False
    if first.strip() == second.strip():
        return True
    first, second = rounded_tuple(first), rounded_tuple(second)
    values = [latex_value(text) for text in (first, second)]
    return first == second or (None not in values and round(values[0], 2) == round(values[1], 2))


def rounded_tuple(text: str) -> str:
    """Returns a tuple "(a,b)" or "[a,b]" with its values to two decimals; other texts as they are."""
    if len(text) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")) or "," not in text:
        return text
    parts = []
    for part in text[1:-1].split(","):
        if "infty" not in part and part not in ("a", "-a"):
            value = latex_value(part)
            if value is None:
                return text
            part = str(round(value, 2) if value % 1 else int(value))
        parts.append(part)
    return f"{text[0]}{','.join(parts)}{text[-1]}"


VALUELESS = (
    ("$", " "), ("\\displaystyle", " "), ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""),
    ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"),
)  # fmt: skip
TOKENS = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\frac|\\sqrt|\\pi|\\cdot|\\times|\\div|[-+*/^(){}])")


def latex_value(text: str) -> float | None:
    """Returns the value of a LaTeX expression of numbers, None for other texts.

    Knows + - * / ^, products without a sign, \\frac, \\sqrt, \\pi, \\cdot, \\times and \\div.
    """
    tokens, place = [], 0
    text = replaced(text, VALUELESS).rstrip()
    while place < len(text):
        if not (found := TOKENS.match(text, place)):
            return None
        tokens.append(found[1])
        place = found.end()
    try:
        value, rest = total(tokens)
        return float(value) if not rest and math.isfinite(value) else None
    except (IndexError, ValueError, ZeroDivisionError, OverflowError, TypeError, RecursionError):
        return None


Parsed = tuple[float, list[str]]
"""A value and the tokens after it."""


def total(tokens: list[str]) -> Parsed:
    value, tokens = product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens[0] == "+" else -1
        term, tokens = product(tokens[1:])
        value += sign * term
    return value, tokens


def product(tokens: list[str]) -> Parsed:
    if tokens[0] in "+-":
        value, rest = product(tokens[1:])
        return (value if tokens[0] == "+" else -value), rest
    value, tokens = power(tokens)
    while tokens and tokens[0] not in ("+", "-", ")", "}", "^"):
        if tokens[0] in ("/", "\\div"):
            factor, tokens = power(tokens[1:])
            value /= factor
        else:
            factor, tokens = power(tokens[1:] if tokens[0] in ("*", "\\cdot", "\\times") else tokens)
            value *= factor
    return value, tokens


def power(tokens: list[str]) -> Parsed:
    value, tokens = single(tokens)
    if tokens and tokens[0] == "^":
        exponent, tokens = single(tokens[1:])
        if abs(exponent) > 1000:
            raise OverflowError(exponent)
        value = value**exponent
    return value, tokens


def single(tokens: list[str]) -> Parsed:
    token, rest = tokens[0], tokens[1:]
    if token in ("(", "{"):
        value, rest = total(rest)
        if rest[0] != {"(": ")", "{": "}"}[token]:
            raise ValueError(token)
        return value, rest[1:]
    if token == "\\frac":
        numerator, rest = single(rest)
        denominator, rest = single(rest)
        return numerator / denominator, rest
    if token == "\\sqrt":
        value, rest = single(rest)
        return math.sqrt(value), rest
    return (math.pi if token == "\\pi" else float(token)), rest


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
