"""Where images stand in text: the `<image>` marker and the run of placeholder tokens it becomes."""

from dataclasses import dataclass

from mindvlm.processing.pieces import Piece

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class ImageSpan:
    """The tokens that stand for one image: start, `num_tokens` placeholders, end."""

    num_tokens: int
    start: str = "<img>"
    placeholder: str = "<imgpad>"
    end: str = "</img>"

    @property
    def text(self) -> str:
        return self.start + self.placeholder * self.num_tokens + self.end

    def expand(self, text: str) -> list[Piece]:
        """Pieces of a message: each `<image>` becomes this span as control text, the rest stays ordinary text."""
        first, *others = text.split(IMAGE_MARKER)
        pieces = [Piece(first)]
        for following in others:
            pieces += [Piece(self.text, control=True), Piece(following)]
        return [piece for piece in pieces if piece.text]
