"""Where images stand in text: the `<image>` marker and the run of placeholder tokens it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.processing.pieces import Piece
from mindvlm.processing.tokenizer import Tokenizer

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class ImageSpan:
    """The tokens that stand for one image: start, `num_tokens` placeholders, end. Start and end may be ''."""

    num_tokens: int
    start: str = "<img>"
    placeholder: str = "<imgpad>"
    end: str = "</img>"

    @property
    def text(self) -> str:
        return self.start + self.placeholder * self.num_tokens + self.end

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

    def expand(self, text: str) -> list[Piece]:
        """Pieces of a message: each `<image>` becomes this span as control text, the rest stays ordinary text."""
        first, *others = text.split(IMAGE_MARKER)
        pieces = [Piece(first)]
        for following in others:
            pieces += [Piece(self.text, control=True), Piece(following)]
        return [piece for piece in pieces if piece.text]
