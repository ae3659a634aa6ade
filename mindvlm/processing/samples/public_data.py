"""Public data sets in the form in which their authors publish them, and what their items become in training records."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mindvlm.core.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Unusable(Exception):
    """Raised for an item that cannot become a record; the message is the reason, without the item's name."""


class Item(NamedTuple):
    """An item of a data set: its name there, and its parsed JSON."""

    id: str
    content: Any


@dataclass(frozen=True)
class Exchange:
    """The questions and answers of an item.

    Attributes:
        texts: a question, its answer, perhaps the next question, and so on; without the mark of the image.
        image: file below the download; None for text alone.
        place: name of the image below the data root, as in the record.
    """

    texts: Sequence[str]
    image: str | None = None
    place: str | None = None


@dataclass(frozen=True, kw_only=True)
class PublicData:
    """A public data set, prepared from a local download.

    Attributes:
        title: its name.
        page: where its authors publish it.
        needs: file or folder below the download -> what it is.
        takes: those that it may lack -> what they are.
        read: returns the items; called with the folder of the download.
        exchange: returns the texts and the image of an item, or raises `Unusable`; called with (item, rng).
        num_records: number of items to draw if the user names none; None takes all.
    """

    title: str
    page: str
    needs: dict[str, str]
    read: Callable[[Path], Iterable[Item]]
    exchange: Callable[[Item, random.Random], Exchange]
    num_records: int | None = None
    takes: dict[str, str] = field(default_factory=dict)


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 file, without byte order mark. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); download it again") from None


def read_json(path: Path, kind: type[list] | type[dict] = dict) -> Any:
    """Returns the content of a JSON file. Raises UserError if it is damaged or not of the type `kind`."""
    return records_of(_parse(read_text(path), f"{path}"), kind, path)


def read_json_lines(path: Path) -> list[Any]:
    """Returns the records of a file with one JSON record a line. Raises UserError if a line is damaged."""
    lines = read_text(path).split("\n")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def items_of(records: Iterable[Any], key: str = "id") -> Iterator[Item]:
    """Yields the records as items named by `key`, or by their number if they lack it."""
    for number, content in enumerate(records):
        try:
            yield Item(text_of(content, key), content)
        except Unusable:
            yield Item(f"{number}", content)


def records_of(content: Any, kind: type[list] | type[dict], path: Path) -> Any:
    """Returns `content` if it has the type `kind`. Raises UserError otherwise."""
    if not isinstance(content, kind):
        expected = "a list [...]" if kind is list else "an object {...}"
        raise UserError(f"{path}: expected {expected}, found {type(content).__name__}; is it the published file?")
    return content


def text_of(content: Any, *keys: str) -> str:
    """Returns the text at nested keys, stripped; a number becomes its text.

    Raises:
        Unusable: there is no text, or an empty one.
    """
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if isinstance(content, int | float) and not isinstance(content, bool):
        content = str(content)
    if not isinstance(content, str) or not content.strip():
        raise Unusable(f"no text under {'.'.join(keys)!r}")
    return content.strip()


def options_of(content: Any, key: str) -> list[str]:
    """Returns the texts of the options of a multiple-choice item. Raises Unusable if there are not 2 to 26."""
    options = content.get(key) if isinstance(content, dict) else None
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise Unusable(f"not 2 to {len(LETTERS)} options under {key!r}")
    return [text_of({key: option}, key) for option in options]


def letter_of(answer: Any, options: Sequence[str]) -> str:
    """Returns the letter of the right option, given by its number from 0 or its letter.

    Raises:
        Unusable: the answer is none of the options.
    """
    if isinstance(answer, str) and len(answer.strip()) == 1:
        answer = LETTERS.find(answer.strip().upper())
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise Unusable("the answer is none of the options")
    return LETTERS[answer]


def shown_options(options: Sequence[str]) -> str:
    """Returns the options in one line: `(A) first (B) second`."""
    return " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f", line {error.lineno}"
        raise UserError(f"{where}{line}: not JSON ({error.msg}); download it again") from None
    except ValueError:  # Python limits the length of numbers
        raise UserError(f"{where}: a number is too long; download it again") from None
    except RecursionError:
        raise UserError(f"{where}: brackets nested too deeply; download it again") from None
