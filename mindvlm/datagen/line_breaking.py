"""Breaks paragraphs of English and Chinese into lines of a given width."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_WIDE = r"\u2e80-\u303e\u3041-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_OPENING = r"（《〈「『【〔［｛“‘"
_CLOSING = r"，。、；：？！）》〉」』】〕］｝”’…—·"
# no line begins with a closing mark or ends with an opening one
_UNIT = re.compile(rf"[{_OPENING}]*(?:[^\s{_WIDE}{_OPENING}{_CLOSING}]+|[{_WIDE}])?[{_CLOSING}]*")


@dataclass(frozen=True)
class Line:
    """One line of a paragraph.

    Attributes:
        units: words, or Chinese characters with their punctuation.
        spaced: whether a space precedes each unit.
        opens: first line of its paragraph.
        closes: last line of its paragraph.
        joint: text of the paragraph between the previous line and this one: a space or nothing.
    """

    units: list[str]
    spaced: list[bool]
    opens: bool
    closes: bool
    joint: str

    @property
    def text(self) -> str:
        return "".join(" " * space + unit for unit, space in zip(self.units, self.spaced, strict=True))


def break_lines(paragraph: str, width: float, indent: float, measure: Callable[[str], float]) -> list[Line]:
    """Fills each line with as many units as fit.

    Args:
        width: in pixels.
        indent: of the first line, in pixels.
        measure: returns the width of a text in pixels.
    """
    space_width = measure(" ")
    lines: list[tuple[list[str], list[bool], str]] = [([], [], "")]
    used = indent
    for unit, has_space in _units(paragraph, width - indent, measure):
        unit_width = measure(unit)
        needed = unit_width + (space_width if has_space and lines[-1][0] else 0.0)
        if lines[-1][0] and used + needed > width:
            lines.append(([], [], " " if has_space else ""))
            used, needed = 0.0, unit_width
        units, spaced, _ = lines[-1]
        spaced.append(has_space and bool(units))
        units.append(unit)
        used += needed
    last = len(lines) - 1
    return [Line(units, spaced, i == 0, i == last, joint) for i, (units, spaced, joint) in enumerate(lines)]


def _units(paragraph: str, width: float, measure: Callable[[str], float]) -> list[tuple[str, bool]]:
    units = []
    for number, word in enumerate(paragraph.split()):
        for i, match in enumerate(m for m in _UNIT.finditer(word) if m.group()):
            for j, part in enumerate(_fitting_parts(match.group(), width, measure)):
                units.append((part, number > 0 and i == j == 0))
    return units


def _fitting_parts(unit: str, width: float, measure: Callable[[str], float]) -> list[str]:
    if measure(unit) <= width:
        return [unit]
    parts = [""]
    for character in unit:
        if parts[-1] and measure(parts[-1] + character) > width:
            parts.append("")
        parts[-1] += character
    return parts
