"""Where images stand in text: the `<image>` marker and the run of placeholder tokens it becomes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.processing.text.pieces import Piece
from mindvlm.processing.text.tokenizer import Tokenizer

IMAGE_MARKER = "<image>"
NEWLINE = -1


def with_image_marks(text: str, marks: tuple[str, str]) -> str:
    """The text with one of the marks before and the other one behind every `<image>`."""
    return text.replace(IMAGE_MARKER, marks[0] + IMAGE_MARKER + marks[1])


@dataclass(frozen=True)
class ImageRows:
    """The feature rows that stand for one picture.

    Attributes:
        num_views: how often the towers look at it: once, or at an overview and at tiles.
        rows: (R,) int32, for each placeholder a row of the views' rows in order; NEWLINE is the learned row.
    """

    num_views: int
    rows: np.ndarray


def joined_rows(pictures: Sequence[ImageRows], num_tokens: int) -> np.ndarray:
    """Rows of several pictures over the feature rows of all their views, (R,) int32.

    Args:
        num_tokens: feature rows of a view.
    """
    joined, start = [np.zeros(0, np.int32)], 0
    for picture in pictures:
        joined.append(np.where(picture.rows == NEWLINE, NEWLINE, picture.rows + start).astype(np.int32))
        start += picture.num_views * num_tokens
    return np.concatenate(joined)


@dataclass(frozen=True)
class ImageSpan:
    """The tokens that stand for one image: start, `num_tokens` placeholders, end. Start and end may be ''."""

    num_tokens: int
    start: str = "<img>"
    placeholder: str = "<imgpad>"
    end: str = "</img>"

    @property
    def text(self) -> str:
        return self.text_of(self.num_tokens)

    def text_of(self, num_tokens: int) -> str:
        """The tokens of an image with another number of placeholders."""
        return self.start + self.placeholder * num_tokens + self.end

    @property
    def tokens(self) -> list[str]:
        """The different tokens of it."""
        return [token for token in (self.start, self.placeholder, self.end) if token]

    def count(self, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> int:
        """Images whose placeholders begin within these ids."""
        placeholders = np.asarray(ids) == tokenizer.special_id(self.placeholder)
        return -(-int(placeholders.sum()) // self.num_tokens)

    def needed_length(self, ids: Sequence[int], tokenizer: Tokenizer) -> int:
        """The ids up to the end of the last image."""
        last = tokenizer.special_id(self.end or self.placeholder)
        return len(ids) - list(ids)[::-1].index(last) if last in ids else 0

    def expand(self, text: str, lengths: Iterator[int] | None = None) -> list[Piece]:
        """Pieces of a message: each `<image>` becomes this span as control text, the rest stays ordinary text.

        Args:
            lengths: gives the number of placeholders of each image; None for `num_tokens` each.
        """
        first, *others = text.split(IMAGE_MARKER)
        pieces = [Piece(first)]
        for following in others:
            length = self.num_tokens if lengths is None else next(lengths)
            pieces += [Piece(self.text_of(length), control=True), Piece(following)]
        return [piece for piece in pieces if piece.text]
