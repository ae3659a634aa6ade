"""What every tokenizer offers, whatever library merges its tokens."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from mindvlm.errors import UserError


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        special_ids: control tokens that may be armed, with their ids.
        vocab_size: number of ids.
        end_token: the token behind a text.
        pad_token: the token that fills a batch.
        prefix_tokens: the tokens in front of every prompt.
        stripping_tokens: control tokens beside which white space is dropped.
    """

    special_ids: dict[str, int]
    vocab_size: int
    end_token: str
    pad_token: str
    prefix_tokens: tuple[str, ...] = ()
    stripping_tokens: frozenset[str] = frozenset()

    def __init__(self, special_tokens: Sequence[str]):
        if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
            raise UserError("special_tokens: every entry must be a non-empty string that occurs once")
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special_tokens else None

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def prefix_ids(self) -> list[int]:
        """Ids in front of every prompt."""
        return [self.special_id(token) for token in self.prefix_tokens]

    @property
    def pad_id(self) -> int:
        """The id that fills a batch."""
        return self.special_id(self.pad_token)

    def special_id(self, token: str) -> int:
        """The id of a special token. Raises UserError if the vocabulary does not have it."""
        if token not in self.special_ids:
            raise UserError(
                f"special token {token!r} is not in the vocabulary: add it to special_tokens of the tokenizer"
            )
        return self.special_ids[token]

    def split_at_special(self, text: str) -> list[str]:
        """The text cut before and after every special surface form; empty parts are left out."""
        parts = self._special_pattern.split(text) if self._special_pattern else [text]
        return [part for part in parts if part]

    def check_id(self, token_id: int) -> None:
        """Raises UserError for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id}: the vocabulary has ids 0 to {self.vocab_size - 1}")

    @abstractmethod
    def normalize(self, text: str) -> str:
        """The form of the text that is encoded."""

    @abstractmethod
    def encode(self, text: str, *, allow_special: bool | Collection[str] = False) -> list[int]:
        """Ids of `text`, without the prefix.

        Args:
            allow_special: False: control tokens are disarmed, their surface forms are ordinary characters.
                True: every special surface form becomes its id. A collection: only these forms do.
        """

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes of the ids. Raises UserError for an id outside the vocabulary."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which has no UTF-8 form."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
