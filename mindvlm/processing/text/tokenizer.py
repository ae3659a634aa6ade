"""What every tokenizer offers, whatever library merges its tokens."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from mindvlm.core.errors import UserError
from mindvlm.processing.text.text_decoders import TextDecoder, Utf8Decoder

PLACEHOLDER_ID = -200
"""The id that the original LLaVA programs put in the place of an image."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        special_ids: control tokens that may be armed, with their ids.
        vocab_size: number of ids.
        end_token: the token behind a text.
        pad_token: the token that fills a batch.
        prefix_tokens: the tokens in front of every prompt.
        stripping_tokens: control tokens beside which white space is dropped.
        restarting_tokens: control tokens behind which text begins anew, as at the start of a prompt.
        continues_text: whether text behind other control tokens is encoded otherwise than at the start.
    """

    special_ids: dict[str, int]
    vocab_size: int
    end_token: str
    pad_token: str
    prefix_tokens: tuple[str, ...] = ()
    stripping_tokens: frozenset[str] = frozenset()
    restarting_tokens: frozenset[str] = frozenset()
    continues_text: bool = False

    def __init__(self, special_tokens: Sequence[str]):
        if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
            raise UserError("special_tokens: every entry must be a non-empty string that occurs once")
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special_tokens else None

    def add_placeholder(self, token: str) -> None:
        """Gives the place of something that is no text an id, unless the vocabulary has one for it.

        The id is PLACEHOLDER_ID: it has no embedding and no logit, and cannot be decoded. Text behind it begins anew.
        """
        if token not in self.special_ids:
            self.special_ids = {**self.special_ids, token: PLACEHOLDER_ID}
            Tokenizer.__init__(self, list(self.special_ids))
            self.restarting_tokens |= {token}

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

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False, continues: bool = False) -> list[int]:
        """Ids of `text`, without the prefix. White space beside `stripping_tokens` that become ids is left out.

        Args:
            allow_special: False: control tokens are disarmed, their surface forms are ordinary characters.
                True: every special surface form becomes its id. A collection: only these forms do.
            continues: the text stands behind a control token; some tokenizers put a space in front of text otherwise.
        """
        text = self.normalize(text)
        if allow_special is False:
            return self.encode_ordinary(text, continues=continues)
        allowed = set(self.special_ids) if allow_special is True else set(allow_special)
        ids: list[int] = []
        pending, before = "", None
        for part in [*self.split_at_special(text), None]:
            if part is not None and part not in allowed:
                pending += part
                continue
            if before in self.stripping_tokens:
                pending = pending.lstrip()
            if part in self.stripping_tokens:
                pending = pending.rstrip()
            ids += self.encode_ordinary(pending, continues=continues)
            if part is not None:
                ids.append(self.special_ids[part])
            pending, before, continues = "", part, part not in self.restarting_tokens
        return ids

    @abstractmethod
    def encode_ordinary(self, text: str, *, continues: bool) -> list[int]:
        """Ids of normalised text in which nothing is special; `continues` as of `encode`."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes of the ids. Raises UserError for an id outside the vocabulary."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary."""
        decoder = self.text_decoder(skip_special=skip_special)
        parts = []
        for token_id in map(int, ids):
            self.check_id(token_id)
            parts.append(decoder.push(token_id))
        return "".join(parts) + decoder.flush()

    def text_decoder(self, *, skip_special: bool) -> TextDecoder:
        """What turns ids into text as they come."""
        return Utf8Decoder(lambda token_id: self.decode_bytes([token_id], skip_special=skip_special))


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which has no UTF-8 form."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
