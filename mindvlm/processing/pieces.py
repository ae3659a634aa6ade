"""Pieces of a prompt that know whether their control tokens are armed, and their tokenisation."""

from collections.abc import Sequence
from dataclasses import dataclass

from mindvlm.processing.tiktoken_tokenizer import TiktokenTokenizer


@dataclass(frozen=True)
class Piece:
    """A stretch of prompt text.

    Attributes:
        control: True for the template's own text, in which special tokens are armed. False for what people, files or
            the model wrote: in it `<|im_end|>` is ordinary text.
        learned: whether training learns to write this piece (an answer and the mark that closes it).
    """

    text: str
    control: bool = False
    learned: bool = False


def encode_pieces(pieces: Sequence[Piece], tokenizer: TiktokenTokenizer) -> tuple[list[int], list[int]]:
    """Ids of the pieces, and for every id the index of the piece in which it begins.

    Plain text between two control tokens is joined before it is split into tokens, whatever pieces it comes from. For
    text without special surface forms the ids are therefore those of the whole prompt string.
    """
    ids: list[int] = []
    owners: list[int] = []
    pending: list[tuple[int, str]] = []

    def encode_pending() -> None:
        text_ids = tokenizer.encode("".join(text for _, text in pending))
        ids.extend(text_ids)
        owners.extend(_first_pieces(pending, text_ids, tokenizer))
        pending.clear()

    for index, piece in enumerate(pieces):
        for part in tokenizer.split_at_special(piece.text) if piece.control else [piece.text]:
            if piece.control and part in tokenizer.special_ids:
                encode_pending()
                ids.append(tokenizer.special_ids[part])
                owners.append(index)
            else:
                pending.append((index, part))
    encode_pending()
    return ids, owners


def _first_pieces(pending: list[tuple[int, str]], text_ids: list[int], tokenizer: TiktokenTokenizer) -> list[int]:
    ends = []
    prefix = ""
    for _, text in pending:
        prefix += text
        ends.append(len(tokenizer.normalize(prefix).encode()))
    owners = []
    position = current = 0
    for token_id in text_ids:
        while current < len(pending) - 1 and position >= ends[current]:
            current += 1
        owners.append(pending[current][0])
        position += len(tokenizer.decode_bytes([token_id]))
    return owners
