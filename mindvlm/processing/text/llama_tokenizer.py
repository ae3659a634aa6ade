"""Llama's SentencePiece tokenizer, from tokenizer.model (sentencepiece) or from tokenizer.json (tokenizers).

SentencePiece writes a space as U+2581 and puts one in front of a text. Where text behind a control token gets one too
is what the styles differ in: "legacy" and "fast" (tokenizer.json as it is) say always, "continuous" (`legacy: false`)
only at the start of a prompt. Text is decoded as transformers 4.37 decodes it with each of them.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from mindvlm.core.errors import UserError
from mindvlm.processing.text.text_decoders import (
    WORD_SPACE,
    FusedDecoder,
    PieceDecoder,
    SkippingDecoder,
    SpacedDecoder,
    TextDecoder,
)
from mindvlm.processing.text.tokenizer import Tokenizer, replace_surrogates
from mindvlm.processing.text.tokenizer_settings import TokenizerSettings
from mindvlm.processing.text.tokenizer_values import check_ids

Style = Literal["continuous", "legacy", "fast"]
MAX_MODEL_BYTES = 64 * 2**20
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# field 3 (normalizer_spec) of the model: its field 3 (add_dummy_prefix) is false; later fields win in protobuf
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class PieceVocabulary:
    """A vocabulary of pieces and what merges text into them.

    Attributes:
        pieces: text of every id.
        encode: ids of text with U+2581 for spaces, nothing put in front.
    """

    pieces: dict[int, str]
    encode: Callable[[str], list[int]]


class LlamaTokenizer(Tokenizer):
    """Text to ids and back.

    Args:
        vocabulary: of `read_piece_model` or `piece_vocabulary`.
        settings: which tokens have which part. The beginning mark stands in front of every prompt unless they say no.
        style: see the module.
        more_special_tokens: control tokens that get the ids behind the vocabulary, where it lacks them.
        name: of the file, for messages.

    Raises:
        UserError: the settings name no end token, or one that the vocabulary lacks.
    """

    def __init__(
        self,
        vocabulary: PieceVocabulary,
        settings: TokenizerSettings,
        *,
        style: Style,
        more_special_tokens: Sequence[str] = (),
        name: str = "tokenizer",
    ):
        self._pieces = dict(vocabulary.pieces)
        self._merge = vocabulary.encode
        self.style = style
        self.continues_text = style == "continuous"
        ids = {piece: token_id for token_id, piece in self._pieces.items()}
        num_pieces = len(ids)
        for token, (token_id, _) in settings.added_tokens.items():
            ids.setdefault(token, token_id)
        for token in more_special_tokens:
            ids.setdefault(token, len(ids))
        self._pieces |= {token_id: token for token, token_id in ids.items()}
        self.vocab_size = max(self._pieces) + 1
        control = dict.fromkeys([*settings.named_tokens, *settings.added_tokens, *more_special_tokens])
        lacking = [token for token in control if token not in ids]
        if lacking or not settings.eos_token:
            missing = f"the token {lacking[0]!r}" if lacking else "an end token"
            raise UserError(f"tokenizer file {name}: lacks {missing}; give the files that belong to the model")
        super().__init__(list(control))
        self.special_ids = {token: ids[token] for token in control}
        self._control_ids = frozenset(self.special_ids.values())
        self._skipped_ids = frozenset(ids[token] for token in (*settings.named_tokens, *more_special_tokens))
        self._added = {ids[token]: token for token in control if ids[token] >= num_pieces}
        self.end_token = settings.eos_token
        self.pad_token = settings.pad_token or settings.unk_token or settings.eos_token
        begins = settings.bos_token and settings.add_bos_token is not False
        self.prefix_tokens = (settings.bos_token,) if begins else ()
        self._byte_values = {
            token_id: int(found.group(1), 16)
            for token_id, piece in vocabulary.pieces.items()
            if (found := BYTE_PIECE.fullmatch(piece))
        }

    def normalize(self, text: str) -> str:
        """The form of the text that is encoded: U+2581 is a space, and a lone surrogate becomes U+FFFD."""
        return replace_surrogates(text).replace(WORD_SPACE, " ")

    def encode_ordinary(self, text: str, *, continues: bool) -> list[int]:
        text = text.replace(" ", WORD_SPACE)
        if text and not (continues and self.continues_text):
            text = WORD_SPACE + text
        return self._merge(text) if text else []

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        parts = []
        for token_id in map(int, ids):
            self.check_id(token_id)
            if token_id in self._byte_values:
                parts.append(bytes([self._byte_values[token_id]]))
            elif token_id not in self._control_ids:
                parts.append(self._pieces.get(token_id, "").replace(WORD_SPACE, " ").encode())
            elif not (skip_special and token_id in self._skipped_ids):
                parts.append(self._pieces[token_id].encode())
        return b"".join(parts)

    def text_decoder(self, *, skip_special: bool) -> TextDecoder:
        decoder: TextDecoder
        if self.style == "fast":
            decoder = FusedDecoder(self._pieces, self._byte_values)
        else:
            control = () if skip_special else self._control_ids
            decoder = PieceDecoder(self._pieces, self._byte_values, control, legacy=self.style == "legacy")
            decoder = SpacedDecoder(decoder, self._added)
        return SkippingDecoder(decoder, self._skipped_ids if skip_special else ())


def read_piece_model(path: Path) -> PieceVocabulary:
    """The vocabulary of a tokenizer.model. Raises UserError if it is missing or no SentencePiece model."""
    if not path.is_file():
        raise UserError(f"tokenizer file {path}: not found; give the tokenizer.model of the checkpoint")
    size = path.stat().st_size
    if not 0 < size <= MAX_MODEL_BYTES:
        raise UserError(f"tokenizer file {path}: {size} bytes, expected 1 to {MAX_MODEL_BYTES}; copy it again")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes() + _NO_DUMMY_PREFIX)
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer file {path}: is no SentencePiece model; copy it again") from None
    return PieceVocabulary({i: model.IdToPiece(i) for i in range(model.GetPieceSize())}, model.EncodeAsIds)


def piece_vocabulary(definition: dict[str, Any], name: str) -> PieceVocabulary:
    """The vocabulary of a tokenizer.json of Llama's form. Raises UserError if the library cannot read it."""
    check_ids(definition["model"].get("vocab"), name)
    plain = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps({**definition, **plain, "added_tokens": []}))
    except Exception as error:  # the library raises no class of its own
        raise UserError(f"tokenizer file {name}: {' '.join(str(error).split())}; copy it again") from None
    pieces = {token_id: piece for piece, token_id in definition["model"]["vocab"].items()}
    return PieceVocabulary(pieces, lambda text: backend.encode(text, add_special_tokens=False).ids)
