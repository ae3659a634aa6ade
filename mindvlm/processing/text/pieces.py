"""Pieces of a prompt with control tokens armed or disarmed, and their tokenization."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mindvlm.processing.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
        control: True for the text of the template, in which control tokens are armed. False for text of users, files or
            the model, in which `<|im_end|>` is ordinary text.
        learned: whether the tokens are training labels (an answer and its closing mark).
    """

    text: str
    control: bool = False
    learned: bool = False


def encode_pieces(
    pieces: Sequence[Piece], tokenizer: Tokenizer, *, continues: bool = False
) -> tuple[list[int], list[int]]:
    """Returns the ids of the pieces, and for every id the index of the piece in which it begins.

    The text between two control tokens is joined across pieces before it is tokenized, so text without surface forms of
    control tokens has the ids of the whole prompt string. White space beside
    `tokenizer.stripping_tokens` is dropped; text after `tokenizer.restarting_tokens` is encoded as at the start of a
    prompt.

    Args:
        continues: whether the pieces follow a control token, see `Tokenizer.encode`.
    """
    ids: list[int] = []
    owners: list[int] = []
    pending: list[tuple[int, str]] = []

    def encode_pending(before: str | None, after: str | None) -> None:
        if before in tokenizer.stripping_tokens:
            _strip(pending, range(len(pending)), str.lstrip)
        if after in tokenizer.stripping_tokens:
            _strip(pending, range(len(pending) - 1, -1, -1), str.rstrip)
        goes_on = continues if before is None else before not in tokenizer.restarting_tokens
        text_ids = tokenizer.encode("".join(text for _, text in pending), continues=goes_on)
        ids.extend(text_ids)
        owners.extend(_first_pieces(pending, text_ids, tokenizer))
        pending.clear()

    previous = None
    for index, piece in enumerate(pieces):
        for part in tokenizer.split_at_special(piece.text) if piece.control else [piece.text]:
            if piece.control and part in tokenizer.special_ids:
                encode_pending(previous, part)
                ids.append(tokenizer.special_ids[part])
                owners.append(index)
                previous = part
            else:
                pending.append((index, part))
    encode_pending(previous, None)
    return ids, owners


def _strip(pending: list[tuple[int, str]], order: Iterable[int], strip: Callable[[str], str]) -> None:
    for position in order:
        index, text = pending[position]
        pending[position] = (index, strip(text))
        if pending[position][1]:
            return


def _first_pieces(pending: list[tuple[int, str]], text_ids: list[int], tokenizer: Tokenizer) -> list[int]:
    if not pending:
        return []
    texts = [text for _, text in pending]
    parts = list(map(tokenizer.normalize, texts))
    if "".join(parts) == tokenizer.normalize("".join(texts)):
        ends = list(accumulate(len(part.encode()) for part in parts))
    else:  # characters compose across pieces
        ends = [len(tokenizer.normalize("".join(texts[:end])).encode()) for end in range(1, len(texts) + 1)]
    owners = []
    # the leading space of the tokenizer belongs to the first piece
    position = ends[-1] - len(tokenizer.decode_bytes(text_ids))
    current = 0
    for token_id in text_ids:
        while current < len(pending) - 1 and position >= ends[current]:
            current += 1
        owners.append(pending[current][0])
        position += len(tokenizer.decode_bytes([token_id]))
    return owners
