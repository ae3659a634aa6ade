"""Byte-level BPE tokenizer over a rank file, as Qwen-1, Vary and StableLM-2 use it (the tiktoken library merges)."""

import base64
import binascii
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer import Tokenizer, replace_surrogates

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

QWEN_SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""Special tokens of the released Vary-toy checkpoint in the order of their ids (151643 to 151859)."""

COMPACT_SPECIAL_TOKENS: tuple[str, ...] = (END_OF_TEXT, TURN_START, TURN_END, "<img>", "</img>", "<imgpad>")
"""What a small model needs: end of text, the two turn marks and the three of the image span."""

ARCADE_SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
    *("<|endofprompt|>", TURN_START, TURN_END, "<|pause|>"),
    *(f"<|reg{number}|>" for number in range(8)),
    "<|extra0|>",
)
"""Special tokens of the Arcade100k vocabulary of StableLM-2; between its ranks and them one id is unused."""

ARCADE_NUM_UNUSED = 1

MAX_RANK_FILE_BYTES = 64 * 2**20


class TiktokenTokenizer(Tokenizer):
    """Text to ids and back.

    Text is NFC-normalised before it is split (so `decode(encode(text))` is the NFC form of `text`). Special tokens take
    the ids after the ranks, in the order given.

    Args:
        num_unused: ids between the ranks and the special tokens that stand for nothing.

    Raises:
        UserError: a special token is empty or occurs twice.
    """

    end_token = pad_token = END_OF_TEXT

    def __init__(
        self,
        ranks: dict[bytes, int],
        *,
        special_tokens: Sequence[str] = QWEN_SPECIAL_TOKENS,
        num_unused: int = 0,
        name: str = "qwen",
    ):
        super().__init__(special_tokens)
        self.num_ranks = len(ranks)
        self.first_special_id = self.num_ranks + num_unused
        self.special_ids: dict[str, int] = {token: self.first_special_id + i for i, token in enumerate(special_tokens)}
        self.vocab_size = self.first_special_id + len(self.special_ids)
        self._encoding = tiktoken.Encoding(
            name, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        special_tokens: Sequence[str] = QWEN_SPECIAL_TOKENS,
        num_unused: int = 0,
        expected_vocab_size: int | None = None,
    ) -> "TiktokenTokenizer":
        """Reads a rank file: one `base64 SPACE rank` per line, LF or CRLF.

        Args:
            num_unused: see the class.
            expected_vocab_size: rows of the model's embedding; ranks plus special tokens must give just that.

        Raises:
            UserError: the file is missing, is not a rank file, or has another number of ranks than expected.
        """
        path = Path(path)
        ranks = read_rank_file(path)
        if expected_vocab_size is not None and len(ranks) + num_unused + len(special_tokens) != expected_vocab_size:
            raise UserError(
                f"tokenizer file {path}: {len(ranks)} ranks, expected {expected_vocab_size - len(special_tokens)} "
                f"(vocabulary of {expected_vocab_size} less {len(special_tokens)} special tokens): "
                "use the file that belongs to the model, or copy it again"
            )
        return cls(ranks, special_tokens=special_tokens, num_unused=num_unused, name=path.name)

    def normalize(self, text: str) -> str:
        """The form of the text that is encoded: NFC, and a lone surrogate becomes U+FFFD."""
        return unicodedata.normalize("NFC", replace_surrogates(text))

    def encode_ordinary(self, text: str, *, continues: bool) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        kept = []
        for token_id in map(int, ids):
            self.check_id(token_id)
            is_unused = self.num_ranks <= token_id < self.first_special_id
            if not is_unused and not (skip_special and token_id >= self.num_ranks):
                kept.append(token_id)
        return self._encoding.decode_bytes(kept)


def read_rank_file(path: str | Path) -> dict[bytes, int]:
    """Token bytes to rank. Raises UserError if the file is missing or is not a complete rank file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"tokenizer file {path}: not found; give the path of the rank file (Vary-toy: qwen.tiktoken)")
    size = path.stat().st_size
    if not 0 < size <= MAX_RANK_FILE_BYTES:
        raise UserError(f"tokenizer file {path}: {size} bytes, expected 1 to {MAX_RANK_FILE_BYTES}; copy it again")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"tokenizer file {path}: cannot be read ({error.strerror})") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            encoded, rank = fields
            token = base64.b64decode(encoded, validate=True)
            is_next = int(rank) == len(ranks)
        except (ValueError, binascii.Error):
            raise UserError(
                f"tokenizer file {path}, line {number}: expected 'base64 rank'; this is not a tiktoken rank file"
            ) from None
        if not is_next or not token or token in ranks:
            raise UserError(
                f"tokenizer file {path}, line {number}: expected a new token of rank {len(ranks)}; the file is damaged"
            )
        ranks[token] = len(ranks)
    num_bytes = sum(bytes([value]) in ranks for value in range(256))
    if num_bytes != 256:
        raise UserError(f"tokenizer file {path}: {num_bytes} of 256 single bytes, expected all; the file is cut off")
    return ranks
