"""The place of a picture in text: the `<image>` marker, and the tokens that replace it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.processing.text.pieces import Piece
from mindvlm.processing.text.tokenizer import Tokenizer

IMAGE_MARKER = "<image>"

# half of a surrogate pair, which the text of a user cannot contain
_DISARMED = "\udc80"


def disarmed(text: str) -> str:
    """Returns a user's text in which `<image>` marks no picture; `ImageSpan.expand` restores the characters.

    Surrogates, which have no UTF-8 form, become U+FFFD.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace(IMAGE_MARKER[:-1], _DISARMED + IMAGE_MARKER[1:-1])


def with_image_marks(text: str, marks: tuple[str, str]) -> str:
    """Returns the text with every `<image>` between the two marks."""
    return text.replace(IMAGE_MARKER, marks[0] + IMAGE_MARKER + marks[1])


@dataclass(frozen=True)
class ImageSpan:
    """The tokens of one image: start, `num_tokens` placeholders, end. Start and end may be empty."""

    num_tokens: int
    start: str = "<img>"
    placeholder: str = "<imgpad>"
    end: str = "</img>"

    @property
    def text(self) -> str:
        return self.text_of(self.num_tokens)

    def text_of(self, num_tokens: int) -> str:
        """Returns the span with another number of placeholders."""
        return self.start + self.placeholder * num_tokens + self.end

    @property
    def tokens(self) -> list[str]:
        """The distinct tokens of the span."""
        return [token for token in (self.start, self.placeholder, self.end) if token]

    def count(self, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] | None = None) -> int:
        """Returns the number of images that begin within these ids.

        Args:
            lengths: number of placeholders of each image; None for `num_tokens` each. A placeholder beyond counts as an
                image.
        """
        num_placeholders = int((np.asarray(ids) == tokenizer.special_id(self.placeholder)).sum())
        if lengths is None:
            return -(-num_placeholders // self.num_tokens)
        starts = np.cumsum([0, *lengths])
        return int((starts[:-1] < num_placeholders).sum()) + max(0, num_placeholders - int(starts[-1]))

    def needed_length(self, ids: Sequence[int], tokenizer: Tokenizer) -> int:
        """Returns the number of ids up to the end of the last image."""
        last = tokenizer.special_id(self.end or self.placeholder)
        return len(ids) - list(ids)[::-1].index(last) if last in ids else 0

    def expand(self, text: str, lengths: Iterator[int] | None = None) -> list[Piece]:
        """Splits a message into pieces: this span as control text for each `<image>`, ordinary text for the rest.

        Args:
            lengths: number of placeholders of each image; None for `num_tokens` each.
        """
        first, *others = (part.replace(_DISARMED, IMAGE_MARKER[0]) for part in text.split(IMAGE_MARKER))
        pieces = [Piece(first)]
        for following in others:
            length = self.num_tokens if lengths is None else next(lengths)
            pieces += [Piece(self.text_of(length), control=True), Piece(following)]
        return [piece for piece in pieces if piece.text]
