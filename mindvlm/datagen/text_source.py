"""Draws passages from text files of any size."""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.fonts import is_chinese

LOOKED_AT_BYTES = 8 << 20
_SPACES = re.compile(r"[^\S\n]+")
_SOFT_BREAK = re.compile(r"(?<=[^\n])\n(?=[^\n])")
_BETWEEN_WIDE = re.compile(r"(?<=[\u2e80-\u9fff\uff00-\uffef]) (?=[\u2e80-\u9fff\uff00-\uffef])")


class TextSource:
    """UTF-8 text files that passages are drawn from, at random places.

    Lines are paragraphs; in files that look wrapped at a fixed width, blank lines separate them.

    Raises:
        UserError: a file is missing, empty or not UTF-8.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [Path(path) for path in paths]
        self.counts: Counter[str] = Counter()
        self.sizes, self.is_wrapped = [], []
        for path in self.paths:
            text = self._look_at(path)
            self.counts.update(clean(text))
            self.sizes.append(path.stat().st_size)
            self.is_wrapped.append(_looks_wrapped(text[: 1 << 16]))

    def passage(self, rng: np.random.Generator, num_characters: int) -> list[str]:
        """Returns the paragraphs of about `num_characters` of one file from a random place; wraps around at its end."""
        number = int(rng.choice(len(self.paths), p=np.array(self.sizes) / sum(self.sizes)))
        start = int(rng.integers(self.sizes[number]))
        text = self._read(number, start, num_characters)
        # the place is in the middle of a line or word: skip to the next
        text = text.partition("\n")[2].lstrip() or text.partition(" ")[2] or text
        while len(text) < num_characters:
            text += "\n\n" + self._read(number, 0, num_characters - len(text))
        if self.is_wrapped[number]:
            text = _SOFT_BREAK.sub(" ", text)
        text = _BETWEEN_WIDE.sub("", text)
        return [line.strip() for line in text.split("\n") if line.strip()]

    def _read(self, number: int, start: int, num_characters: int) -> str:
        with open(self.paths[number], "rb") as file:
            file.seek(start)
            return clean(file.read(4 * num_characters + 4096).decode("utf-8", "ignore")) or " "

    @staticmethod
    def _look_at(path: Path) -> str:
        try:
            decoder = codecs.getincrementaldecoder("utf-8")()
            with open(path, "rb") as file:
                text = decoder.decode(file.read(LOOKED_AT_BYTES))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise UserError(f"text file {path}, line {line}: not UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"text file {path}: cannot be read ({error.strerror}); check the path") from None
        if not clean(text).strip():
            raise UserError(f"text file {path}: no text in it")
        return text


def clean(text: str) -> str:
    """Normalizes to NFC, unifies line ends, collapses spaces and removes characters that cannot be printed."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c for c in text if c == "\n" or c.isprintable() or c.isspace())
    return _SPACES.sub(" ", text)


def _looks_wrapped(text: str) -> bool:
    lines = text.split("\n")
    lengths = [len(line) for line in lines if line.strip()]
    if is_chinese(text) or len(lengths) >= len(lines) - 1:
        return False
    return np.median(lengths) >= 45 and np.quantile(lengths, 0.98) <= 100
