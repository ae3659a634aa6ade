"""Byte-level BPE tokenizer of the GPT-2 kind, as OPT, Vary-tiny and Phi-2 use it (the tokenizers library merges)."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mindvlm.core.errors import UserError
from mindvlm.processing.text.text_decoders import CleaningDecoder, SkippingDecoder, SpacedDecoder, TextDecoder
from mindvlm.processing.text.tokenizer import Tokenizer, replace_surrogates
from mindvlm.processing.text.tokenizer_values import check_added_tokens, check_id, check_ids

OPT_SPECIAL_TOKENS: tuple[str, ...] = ("</s>", "<pad>", "<imgpad>", "<img>", "</img>")
"""Special tokens of Vary-tiny. OPT's vocabulary has the first two; the others get the next ids: 50265, 50266, 50267."""

IMAGE_TOKENS = frozenset(("<imgpad>", "<img>", "</img>"))
MAX_VOCABULARY_BYTES = 64 * 2**20


class BpeTokenizer(Tokenizer):
    """Text to ids and back.

    A special token that the vocabulary has keeps its id, the others take the next ids in the order given.

    Args:
        definition: the contents of a tokenizer.json of the library; its added tokens become part of the vocabulary.
            Those with `"special": false` are found in every text, others only where `special_tokens` names them.
        special_tokens: control tokens.
        prefix_tokens, end_token, pad_token, stripping_tokens: see `Tokenizer`; the defaults are those of Vary-tiny,
            which was trained with a tokenizer that drops white space beside the tokens of an image.
        sets_added_apart: decoded text has a space on both sides of the added tokens that are found in every text.
        cleans_spaces: decoded text has no space before English punctuation, see `clean_spaces`.
        allow_unused_ids: numbers may be left out between 0 and the last id.
        name: of the file, for messages.

    Raises:
        UserError: a special token is empty or occurs twice, or the definition is no complete byte-level BPE.
    """

    def __init__(
        self,
        definition: dict[str, Any],
        *,
        special_tokens: Sequence[str] = OPT_SPECIAL_TOKENS,
        prefix_tokens: Sequence[str] = ("</s>",),
        end_token: str = "</s>",
        pad_token: str = "<pad>",
        stripping_tokens: Collection[str] = IMAGE_TOKENS,
        sets_added_apart: bool = False,
        cleans_spaces: bool = False,
        allow_unused_ids: bool = False,
        name: str = "tokenizer",
    ):
        super().__init__(special_tokens)
        self.prefix_tokens, self.stripping_tokens = tuple(prefix_tokens), frozenset(stripping_tokens)
        self.end_token, self.pad_token = end_token, pad_token
        ids = _vocabulary(definition, name, allow_unused_ids)
        self.num_file_tokens = len(ids)
        next_id = max(ids.values()) + 1
        for token in special_tokens:
            next_id += ids.setdefault(token, next_id) == next_id
        self.special_ids = {token: ids[token] for token in special_tokens}
        self.vocab_size = next_id
        self._tokens = {token_id: token for token, token_id in ids.items()}
        self._special_id_set = frozenset(self.special_ids.values())
        self.cleans_spaces = cleans_spaces
        # in the library added tokens are armed in every text
        found = [
            token
            for token in definition.get("added_tokens") or ()
            if token.get("special") is False and token["content"] not in self.special_ids
        ]
        self._set_apart = {token["id"]: token["content"] for token in found} if sets_added_apart else {}
        plain = {**definition, "added_tokens": found, "post_processor": None, "truncation": None, "padding": None}
        try:
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises no class of its own
            raise UserError(f"tokenizer file {name}: {' '.join(str(error).split())}; copy it again") from None
        for token in found:
            if self._backend.token_to_id(token["content"]) != token["id"]:
                raise UserError(
                    f"tokenizer file {name}: the added token {token['content']!r} has the id {token['id']}, which is "
                    "not the next one; copy it again"
                )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        special_tokens: Sequence[str] = OPT_SPECIAL_TOKENS,
        expected_vocab_size: int | None = None,
    ) -> "BpeTokenizer":
        """Reads a tokenizer.json, or a vocab.json with merges.txt (and added_tokens.json, if there is one) beside it.

        Args:
            path: one of these files, or the folder that has them.
            expected_vocab_size: rows of the model's embedding; the vocabulary and the special tokens that it lacks
                must give just that.

        Raises:
            UserError: a file is missing or damaged, or the vocabulary has another size than expected.
        """
        path = find_definition(Path(path))
        tokenizer = cls(read_definition(path), special_tokens=special_tokens, name=str(path))
        if expected_vocab_size is not None and tokenizer.vocab_size != expected_vocab_size:
            num_added = tokenizer.vocab_size - tokenizer.num_file_tokens
            raise UserError(
                f"tokenizer file {path}: {tokenizer.num_file_tokens} tokens, expected "
                f"{expected_vocab_size - num_added} (vocabulary of {expected_vocab_size} less {num_added} special "
                "tokens): use the file that belongs to the model, or copy it again"
            )
        return tokenizer

    def normalize(self, text: str) -> str:
        """The form of the text that is encoded: a lone surrogate becomes U+FFFD; the file may say more (NFC)."""
        text = replace_surrogates(text)
        return self._backend.normalizer.normalize_str(text) if self._backend.normalizer else text

    def encode_ordinary(self, text: str, *, continues: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        parts = []
        for token_id in map(int, ids):
            self.check_id(token_id)
            if token_id in self._special_id_set:
                parts.append(b"" if skip_special else self._tokens[token_id].encode())
            else:
                parts.append(_token_bytes(self._tokens.get(token_id, "")))
        return b"".join(parts)

    def text_decoder(self, *, skip_special: bool) -> TextDecoder:
        decoder = super().text_decoder(skip_special=skip_special)
        if self._set_apart:
            decoder = SkippingDecoder(
                SpacedDecoder(decoder, self._set_apart), self._special_id_set if skip_special else ()
            )
        return CleaningDecoder(decoder) if self.cleans_spaces else decoder


def byte_characters() -> dict[str, int]:
    """GPT-2's printable character for each byte, as character -> byte: printable Latin-1 stands for itself, the other
    bytes in order are U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + position): byte for position, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTES = byte_characters()


def _token_bytes(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _vocabulary(definition: dict[str, Any], name: str, allow_unused_ids: bool) -> dict[str, int]:
    """Token -> id of a definition, its added tokens included, checked for completeness."""
    model = definition.get("model")
    kind = model.get("type") if isinstance(model, dict) and isinstance(model.get("vocab"), dict) else None
    if kind != "BPE" or "ByteLevel" not in json.dumps(definition.get("pre_tokenizer")):
        raise UserError(f"tokenizer file {name}: is no byte-level BPE; give the tokenizer that belongs to the model")
    check_ids(model["vocab"], name)
    ids = dict(model["vocab"])
    ids |= {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    numbers = sorted(ids.values())
    is_sound = numbers[0] == 0 and len(set(numbers)) == len(numbers) and numbers[-1] < 2 * len(numbers)
    if not (is_sound and (allow_unused_ids or numbers[-1] == len(numbers) - 1)):
        raise UserError(f"tokenizer file {name}: its {len(ids)} tokens do not have the ids 0 to {len(ids) - 1}")
    num_bytes = sum(character in ids for character in _BYTES)
    if num_bytes != 256:
        raise UserError(f"tokenizer file {name}: {num_bytes} of 256 single bytes, expected all; copy it again")
    return ids


def find_definition(path: Path) -> Path:
    """tokenizer.json or vocab.json of a folder; a file is returned as it is."""
    if not path.is_dir():
        return path
    for name in ("tokenizer.json", "vocab.json"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"tokenizer folder {path}: has neither tokenizer.json nor vocab.json; give the model's folder")


def read_definition(path: Path) -> dict[str, Any]:
    """The contents of a tokenizer.json; a vocab.json and its merges.txt are written in the same form.

    Raises:
        UserError: a file is missing or damaged, or the added tokens are no tokens.
    """
    contents = _read_json(path)
    if "model" in contents and isinstance(contents["model"], dict):
        check_added_tokens(contents.get("added_tokens"), path)
        return contents
    merges = [line for line in _read_text(path.with_name("merges.txt")).splitlines() if line.strip()]
    merges = [line for line in merges if not line.startswith("#version")]
    added_path = path.with_name("added_tokens.json")
    added = _read_json(added_path) if added_path.exists() else {}
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": None,
        "added_tokens": [{"content": token, "id": check_id(token, id_, added_path)} for token, id_ in added.items()],
        "model": {"type": "BPE", "vocab": contents, "merges": merges},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer file {path}: is no JSON ({error}); copy it again") from None
    if not isinstance(contents, dict):
        raise UserError(f"tokenizer file {path}: holds no mapping of tokens to ids; give vocab.json or tokenizer.json")
    return contents


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"tokenizer file {path}: not found; give vocab.json and merges.txt, or tokenizer.json")
    size = path.stat().st_size
    if not 0 < size <= MAX_VOCABULARY_BYTES:
        raise UserError(f"tokenizer file {path}: {size} bytes, expected 1 to {MAX_VOCABULARY_BYTES}; copy it again")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer file {path}: cannot be read ({' '.join(str(error).split())})") from None
