"""Vocabularies of three kinds of tokenizer files, each tokenized by the library that reproduces it exactly.

- tiktoken ranks (Qwen, StableLM-2): tiktoken. `tokenizers` returns the same ids, but takes three times as long to open
  151,643 ranks and five to twenty times as long to encode.
- tokenizer.json, or vocab.json with merges.txt: tokenizers.
- SentencePiece's tokenizer.model (Llama): sentencepiece, the only one that reads its scores and normalization.
"""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
import tokenizers

from mindvlm.core.errors import UserError
from mindvlm.processing.text.text_decoders import WORD_SPACE
from mindvlm.processing.text.tokenizer_settings import (
    ADDED_TOKENS,
    check_added_tokens,
    check_id,
    check_ids,
    check_ids_of_added_tokens,
    read_file,
    read_mapping,
)

RANK_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# field 3 (normalizer_spec) of the model: its field 3 (add_dummy_prefix) is false; later fields win in protobuf
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a file, with the functions that tokenize text.

    Attributes:
        num_ids: number of used ids; new control tokens follow.
        ids: ids of the tokens that may be control tokens.
        split: returns the ids of normalized text with control tokens disarmed.
        normalize: returns the normalized text.
        token_bytes: returns the bytes of an id, b"" for an unused one.
        adds_second_space: whether text that begins with a space gets a leading space too.
        pieces: text of every id of a SentencePiece vocabulary.
        byte_values: byte of every single-byte id of a SentencePiece vocabulary.
    """

    num_ids: int
    ids: Mapping[str, int]
    split: Callable[[str], list[int]]
    normalize: Callable[[str], str]
    token_bytes: Callable[[int], bytes]
    adds_second_space: bool = True
    pieces: Mapping[int, str] = field(default_factory=dict)
    byte_values: Mapping[int, int] = field(default_factory=dict)


def rank_vocabulary(ranks: Mapping[bytes, int], *, num_unused: int = 0, name: str = "ranks") -> Vocabulary:
    """Returns the vocabulary of tiktoken ranks. Text is NFC-normalized before it is split.

    Args:
        num_unused: number of unused ids between the ranks and the control tokens.
    """
    encoding = tiktoken.Encoding(name, pat_str=RANK_PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
    tokens = [*ranks, *[b""] * num_unused]
    return Vocabulary(
        num_ids=len(tokens),
        ids={},
        split=encoding.encode_ordinary,
        normalize=partial(unicodedata.normalize, "NFC"),
        token_bytes=tokens.__getitem__,
    )


def read_rank_file(path: Path) -> dict[bytes, int]:
    """Reads token bytes and their ranks: one `base64 SPACE rank` per line, LF or CRLF.

    Raises:
        UserError: the file is missing or is not a complete rank file.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path, "give the path of the rank file").splitlines(), start=1):
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


def read_definition(path: Path) -> dict[str, Any]:
    """Reads a tokenizer.json, or a vocab.json with merges.txt in the same form.

    Raises:
        UserError: a file is missing or damaged, or an added token has no text or id.
    """
    remedy = "give vocab.json and merges.txt, or tokenizer.json"
    contents = read_mapping(path, remedy)
    if isinstance(contents.get("model"), dict):
        check_added_tokens(contents.get("added_tokens"), path)
        return contents
    merges_path, added_path = path.with_name("merges.txt"), path.with_name(ADDED_TOKENS)
    try:
        merges = read_file(merges_path, remedy).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer file {merges_path}: cannot be read ({error})") from None
    added = read_mapping(added_path) if added_path.exists() else {}
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "added_tokens": [{"content": token, "id": check_id(token, id_, added_path)} for token, id_ in added.items()],
        "model": {
            "type": "BPE",
            "vocab": contents,
            "merges": [line for line in merges if line.strip() and not line.startswith("#version")],
        },
    }


def byte_level_vocabulary(definition: Mapping[str, Any], name: str, *, control: Collection[str]) -> Vocabulary:
    """Returns the vocabulary of a byte-level BPE.

    Added tokens with `"special": false`, such as Phi-2's runs of spaces, are recognized in every text unless they are
    control tokens.

    Args:
        definition: see `read_definition`.
        name: name of the file, for messages.
        control: the control tokens.

    Raises:
        UserError: the definition is not a complete byte-level BPE.
    """
    model, added = definition["model"], definition.get("added_tokens") or ()
    is_byte_level = "ByteLevel" in json.dumps(definition.get("pre_tokenizer"))
    if not (model.get("type") == "BPE" and isinstance(model.get("vocab"), dict) and is_byte_level):
        raise UserError(f"tokenizer file {name}: not a byte-level BPE; give the tokenizer that belongs to the model")
    check_ids(model["vocab"], name)
    added_ids = {token["content"]: token["id"] for token in added}
    check_ids_of_added_tokens(added_ids, model["vocab"], name)
    ids = model["vocab"] | added_ids
    numbers = sorted(ids.values())
    if numbers[0] != 0 or len(set(numbers)) != len(numbers) or numbers[-1] >= 2 * len(numbers):
        raise UserError(f"tokenizer file {name}: its {len(ids)} tokens do not have the ids 0 to {len(ids) - 1}")
    num_bytes = sum(character in ids for character in _BYTES)
    if num_bytes != 256:
        raise UserError(f"tokenizer file {name}: {num_bytes} of 256 single bytes, expected all; copy it again")
    found = [token for token in added if token.get("special") is False and token["content"] not in control]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    # the library renumbers added tokens unless the model contains them
    with_ids = model | {"vocab": model["vocab"] | {token["content"]: token["id"] for token in found}}
    backend = _backend({**definition, "model": with_ids, "added_tokens": [flags | token for token in found]}, name)
    tokens = {token_id: token for token, token_id in ids.items()}
    return Vocabulary(
        num_ids=numbers[-1] + 1,
        ids=ids,
        split=lambda text: backend.encode(text, add_special_tokens=False).ids,
        normalize=backend.normalizer.normalize_str if backend.normalizer else str,
        token_bytes=lambda token_id: _byte_level_bytes(tokens.get(token_id, "")),
    )


def byte_characters() -> dict[str, int]:
    """Maps GPT-2's printable characters to the bytes that they represent.

    Printable Latin-1 characters represent themselves; U+0100, U+0101, ... represent the other bytes in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + position): byte for position, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTES = byte_characters()


def _byte_level_bytes(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def read_piece_model(path: Path) -> Vocabulary:
    """Reads a SentencePiece tokenizer.model. Raises UserError if it is missing or damaged."""
    contents = read_file(path, "give the tokenizer.model of the checkpoint")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(contents + _NO_DUMMY_PREFIX)
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer file {path}: not a SentencePiece model; copy it again") from None
    return piece_vocabulary({i: model.IdToPiece(i) for i in range(model.GetPieceSize())}, model.EncodeAsIds)


def piece_definition(definition: Mapping[str, Any], name: str) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json with SentencePiece pieces. Raises UserError if it is damaged."""
    vocabulary = definition["model"].get("vocab")
    check_ids(vocabulary, name)
    pre_tokenizer = definition.get("pre_tokenizer")
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Metaspace":
        pre_tokenizer = pre_tokenizer | {"prepend_scheme": "never", "add_prefix_space": False}
    else:
        pre_tokenizer = None
    backend = _backend({**definition, "added_tokens": [], "normalizer": None, "pre_tokenizer": pre_tokenizer}, name)
    pieces = {token_id: piece for piece, token_id in vocabulary.items()}
    found = piece_vocabulary(pieces, lambda text: backend.encode(text, add_special_tokens=False).ids)
    return replace(found, adds_second_space=pre_tokenizer is None)


def piece_vocabulary(pieces: Mapping[int, str], split: Callable[[str], list[int]]) -> Vocabulary:
    """Returns a vocabulary of SentencePiece pieces, in which U+2581 stands for a space.

    Args:
        pieces: text of every id.
        split: returns the ids of text with U+2581 for spaces.
    """
    byte_values = {
        token_id: int(found[1], 16) for token_id, piece in pieces.items() if (found := BYTE_PIECE.fullmatch(piece))
    }

    def token_bytes(token_id: int) -> bytes:
        if token_id in byte_values:
            return bytes([byte_values[token_id]])
        return pieces.get(token_id, "").replace(WORD_SPACE, " ").encode()

    return Vocabulary(
        num_ids=max(pieces) + 1,
        ids={piece: token_id for token_id, piece in pieces.items()},
        split=lambda text: split(text.replace(" ", WORD_SPACE)),
        normalize=lambda text: text.replace(WORD_SPACE, " "),
        token_bytes=token_bytes,
        pieces=pieces,
        byte_values=byte_values,
    )


def _backend(definition: Mapping[str, Any], name: str) -> tokenizers.Tokenizer:
    plain = dict.fromkeys(("post_processor", "decoder", "truncation", "padding"))
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**definition, **plain}))
    except Exception as error:  # the library raises no class of its own
        raise UserError(f"tokenizer file {name}: {' '.join(str(error).split())}; copy it again") from None
