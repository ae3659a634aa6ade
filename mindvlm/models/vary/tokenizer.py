"""The tokenizers of Vary, with image tokens: Qwen's ranks (Vary-toy) and OPT's byte-level BPE (Vary-tiny)."""

from collections.abc import Sequence
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer
from mindvlm.processing.text.tokenizer_files import find_tokenizer
from mindvlm.processing.text.tokenizer_settings import refuse_gap
from mindvlm.processing.text.vocabulary import byte_level_vocabulary, rank_vocabulary, read_definition, read_rank_file

QWEN_SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""Control tokens of the released Vary-toy checkpoint in the order of their ids (151643 to 151859)."""

COMPACT_SPECIAL_TOKENS: tuple[str, ...] = (END_OF_TEXT, TURN_START, TURN_END, "<img>", "</img>", "<imgpad>")
"""The control tokens of a small model such as Vary-nano."""

OPT_SPECIAL_TOKENS: tuple[str, ...] = ("</s>", "<pad>", "<imgpad>", "<img>", "</img>")
"""Control tokens of Vary-tiny. OPT's vocabulary contains the first two; the others have the ids 50265 to 50267."""

IMAGE_TOKENS = ("<imgpad>", "<img>", "</img>")


def open_tokenizer(
    path: str, *, special_tokens: Sequence[str] | None = None, expected_vocab_size: int | None = None
) -> Tokenizer:
    """Opens OPT's tokenizer from a folder or a JSON file, or Qwen's from a rank file.

    Args:
        path: the file, or the folder of OPT's files.
        special_tokens: control tokens; None for those of Vary-tiny or Vary-toy.
        expected_vocab_size: rows of the model's embedding, which the number of ids must equal.

    Raises:
        UserError: the file is missing or damaged, or the vocabulary does not have the expected size.
    """
    file = find_tokenizer(Path(path))
    tokenizer = rank_tokenizer(file, special_tokens) if file.suffix != ".json" else opt_tokenizer(file, special_tokens)
    if expected_vocab_size not in (None, len(tokenizer)):
        refuse_gap(tokenizer.vocabulary.ids, file)
        num_added = len(tokenizer) - tokenizer.num_file_tokens
        raise UserError(
            f"tokenizer file {file}: {tokenizer.num_file_tokens} tokens, expected {expected_vocab_size - num_added} "
            f"(vocabulary of {expected_vocab_size} less {num_added} special tokens): use the file that belongs to the "
            "model, or copy it again"
        )
    return tokenizer


def rank_tokenizer(file: Path, special_tokens: Sequence[str] | None = None) -> Tokenizer:
    """Opens a tiktoken rank file. Raises UserError like `open_tokenizer`."""
    tokens = QWEN_SPECIAL_TOKENS if special_tokens is None else special_tokens
    return Tokenizer(rank_vocabulary(read_rank_file(file), name=file.name), tokens)


def opt_tokenizer(file: Path, special_tokens: Sequence[str] | None = None) -> Tokenizer:
    """Opens a tokenizer.json, or a vocab.json with merges.txt beside it. Raises UserError like `open_tokenizer`.

    As in the original program, white space beside image tokens is dropped.
    """
    tokens = OPT_SPECIAL_TOKENS if special_tokens is None else special_tokens
    vocabulary = byte_level_vocabulary(read_definition(file), str(file), control=tokens)
    return Tokenizer(
        vocabulary, tokens, end_token="</s>", pad_token="<pad>", prefix_tokens=["</s>"], stripping_tokens=IMAGE_TOKENS
    )
