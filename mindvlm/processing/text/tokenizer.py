"""Tokenizer with control tokens that are armed only where the caller allows them."""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Literal

from mindvlm.core.errors import UserError
from mindvlm.processing.text.text_decoders import (
    CleaningDecoder,
    FusedDecoder,
    PieceDecoder,
    SkippingDecoder,
    SpacedDecoder,
    TextDecoder,
    Utf8Decoder,
)
from mindvlm.processing.text.vocabulary import Vocabulary

PLACEHOLDER_ID = -200
"""The id of an image in the original LLaVA programs."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

Style = Literal["bytes", "continuous", "legacy", "fast"]


class Tokenizer:
    """Converts text to ids and ids to text.

    Control tokens are recognized only where the caller arms them; elsewhere their surface forms are ordinary text. A
    control token in the vocabulary keeps its id; the others get the next ids in order.

    Args:
        special_tokens: the control tokens.
        end_token, pad_token, prefix_tokens, stripping_tokens: see the attributes.
        style: "bytes" for a byte-level vocabulary. The others are the Llama tokenizers of transformers 4.37, which add
            a leading space and differ in decoding: "continuous" is the slow class with `legacy: false`, "legacy" the
            slow class without it, "fast" the decoder of a tokenizer.json.
        continues_text: see the attributes.
        skipped_tokens: control tokens that `skip_special` skips in decoding; None for all.
        spaced_tokens: tokens that are surrounded with spaces in decoded text.
        cleans_spaces: whether decoding removes spaces before English punctuation, see `clean_spaces`.

    Attributes:
        special_ids: ids of the control tokens.
        vocab_size: number of ids.
        num_file_tokens: number of ids of the vocabulary's file.
        end_token: the end-of-text token.
        pad_token: the padding token.
        prefix_tokens: tokens at the beginning of every prompt.
        stripping_tokens: control tokens beside which white space is dropped.
        restarting_tokens: control tokens after which text is encoded as at the start of a prompt.
        continues_text: whether text after other control tokens gets no leading space.

    Raises:
        UserError: a control token is empty or occurs twice.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        special_tokens: Sequence[str],
        *,
        end_token: str = END_OF_TEXT,
        pad_token: str = END_OF_TEXT,
        prefix_tokens: Sequence[str] = (),
        stripping_tokens: Collection[str] = (),
        style: Style = "bytes",
        continues_text: bool = False,
        skipped_tokens: Collection[str] | None = None,
        spaced_tokens: Iterable[str] = (),
        cleans_spaces: bool = False,
    ):
        if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
            raise UserError("special_tokens: every entry must be a non-empty string that occurs once")
        self.vocabulary, self.style, self.continues_text = vocabulary, style, continues_text
        self.special_ids: dict[str, int] = {}
        next_id = vocabulary.num_ids
        for token in special_tokens:
            self.special_ids[token] = vocabulary.ids.get(token, next_id)
            next_id += token not in vocabulary.ids
        self.num_file_tokens, self.vocab_size = vocabulary.num_ids, next_id
        self.end_token, self.pad_token, self.prefix_tokens = end_token, pad_token, tuple(prefix_tokens)
        self.stripping_tokens, self.restarting_tokens = frozenset(stripping_tokens), frozenset[str]()
        self._special_texts = {token_id: token for token, token_id in self.special_ids.items()}
        skipped = special_tokens if skipped_tokens is None else skipped_tokens
        self._skipped_ids = frozenset(self.special_ids[token] for token in skipped)
        self._known = {**vocabulary.ids, **self.special_ids}
        self._spaced, self._cleans_spaces = {self._known[token]: token for token in spaced_tokens}, cleans_spaces
        self._pieces = {**vocabulary.pieces, **self._special_texts}
        self._special_pattern = _pattern(self.special_ids)

    def add_placeholder(self, token: str) -> None:
        """Adds a control token that stands for an image, unless the vocabulary has it.

        Its id is PLACEHOLDER_ID, which has no embedding or logit and cannot be decoded. Text after it is encoded as at
        the start of a prompt.
        """
        if token not in self.special_ids:
            self.special_ids = {**self.special_ids, token: PLACEHOLDER_ID}
            self._special_pattern = _pattern(self.special_ids)
            self.restarting_tokens |= {token}

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def prefix_ids(self) -> list[int]:
        """Ids at the beginning of every prompt."""
        return [self.special_id(token) for token in self.prefix_tokens]

    @property
    def pad_id(self) -> int:
        """The padding id."""
        return self.special_id(self.pad_token)

    @cached_property
    def max_token_bytes(self) -> int:
        """Length of the longest token."""
        return max(len(self._token_bytes(token_id)) for token_id in range(self.vocab_size))

    def special_id(self, token: str) -> int:
        """Returns the id of a control token. Raises UserError if there is no such token."""
        if token not in self.special_ids:
            raise UserError(
                f"special token {token!r} is not in the vocabulary; add it to special_tokens of the tokenizer"
            )
        return self.special_ids[token]

    def split_at_special(self, text: str) -> list[str]:
        """Splits text before and after every control token. Empty parts are dropped."""
        parts = self._special_pattern.split(text) if self._special_pattern else [text]
        return [part for part in parts if part]

    def normalize(self, text: str) -> str:
        """Returns the normalized text. A lone surrogate, which has no UTF-8 form, becomes U+FFFD."""
        return self.vocabulary.normalize(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False, continues: bool = False) -> list[int]:
        """Returns the ids of `text`, without the prefix.

        White space beside armed `stripping_tokens` is dropped.

        Args:
            allow_special: False disarms all control tokens, True arms all, a collection arms its members.
            continues: whether the text follows a control token, see `continues_text`.
        """
        text = self.normalize(text)
        if allow_special is False:
            return self._encode_ordinary(text, continues)
        allowed = self.special_ids.keys() if allow_special is True else self.special_ids.keys() & set(allow_special)
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
            ids += self._encode_ordinary(pending, continues)
            if part is not None:
                ids.append(self.special_ids[part])
            pending, before, continues = "", part, part not in self.restarting_tokens
        return ids

    def _encode_ordinary(self, text: str, continues: bool) -> list[int]:
        if text and self.style != "bytes" and not (continues and self.continues_text):
            text = text if text[0] == " " and not self.vocabulary.adds_second_space else " " + text
        return self.vocabulary.split(text) if text else []

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Joins the bytes of the ids, without those outside the vocabulary."""
        skipped = self._skipped_ids if skip_special else ()
        return b"".join(self._token_bytes(token_id) for token_id in map(int, ids) if token_id not in skipped)

    def _token_bytes(self, token_id: int) -> bytes:
        # a model may have more rows of embeddings than there are tokens, and select one of them
        if not 0 <= token_id < self.vocab_size:
            return b""
        if token_id in self._special_texts:
            return self._special_texts[token_id].encode()
        return self.vocabulary.token_bytes(token_id)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of the ids. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        decoder = self.text_decoder(skip_special=skip_special)
        parts = []
        for token_id in map(int, ids):
            if not 0 <= token_id < self.vocab_size:
                raise UserError(f"token id {token_id}: the vocabulary has ids 0 to {self.vocab_size - 1}")
            parts.append(decoder.push(token_id))
        return "".join(parts) + decoder.flush()

    def text_decoder(self, *, skip_special: bool = True) -> TextDecoder:
        """Returns an incremental decoder, see `TextDecoder`. Ids outside the vocabulary have no text."""
        skipped = self._skipped_ids if skip_special else frozenset()
        decoder: TextDecoder
        if self.style == "bytes":
            decoder = Utf8Decoder(self._token_bytes)
        elif self.style == "fast":
            decoder = FusedDecoder(self._pieces, self.vocabulary.byte_values)
        else:
            ends_run = () if skip_special else self._special_texts
            byte_values, is_legacy = self.vocabulary.byte_values, self.style == "legacy"
            decoder = PieceDecoder(self._pieces, byte_values, ends_run, known=self._known, legacy=is_legacy)
        if self._spaced:
            decoder = SpacedDecoder(decoder, self._spaced)
        decoder = SkippingDecoder(decoder, skipped)
        return CleaningDecoder(decoder) if self._cleans_spaces else decoder


def _pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
