"""Settings from the JSON files of a Hugging Face tokenizer. Errors name the file and key of an invalid value."""

import codecs
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.untrusted import refuse_lfs_pointer
from mindvlm.core.errors import UserError

RANK_PATTERNS = ("*.tiktoken", "*.tiktoken.txt")
"""File names of tiktoken ranks."""

ADDED_TOKENS = "added_tokens.json"
MAX_FILE_BYTES = 64 * 2**20
MAX_ID = 2**31 - 1
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("add_bos_token", "legacy", "clean_up_tokenization_spaces")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Settings of a tokenizer.

    Attributes:
        tokenizer_class: class of transformers; "" if absent.
        bos_token, eos_token, unk_token, pad_token: None if absent.
        additional_special_tokens: further control tokens.
        add_bos_token: whether every text begins with `bos_token`; None if absent.
        legacy: whether text after control tokens is handled as in early Llama tokenizers; None if absent.
        clean_up_tokenization_spaces: whether decoding removes spaces before punctuation.
        added_tokens: id and `special` of every added token, by its text.
    """

    tokenizer_class: str = ""
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    additional_special_tokens: tuple[str, ...] = ()
    add_bos_token: bool | None = None
    legacy: bool | None = None
    clean_up_tokenization_spaces: bool = False
    added_tokens: dict[str, tuple[int, bool]] = field(default_factory=dict)

    @property
    def named_tokens(self) -> tuple[str, ...]:
        """The distinct tokens that decoding skips."""
        roles = [token for token in (self.bos_token, self.eos_token, self.unk_token, self.pad_token) if token]
        return tuple(dict.fromkeys([*roles, *self.additional_special_tokens]))

    @property
    def is_fast(self) -> bool:
        """Whether the class is a fast one of transformers, which adds no spaces around added tokens in decoding."""
        return self.tokenizer_class.endswith("Fast")


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json, each if it exists.

    Raises:
        UserError: a file is not a JSON mapping, or a value has the wrong type.
    """
    config_file, map_file, added_file = (
        folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", ADDED_TOKENS)
    )
    own, special_map, added_ids = (
        read_mapping(file) if file.is_file() else {} for file in (config_file, map_file, added_file)
    )
    _check_settings(special_map, map_file)
    _check_settings(own, config_file)
    config = {**special_map, **own}
    roles = {role: token_text(config.get(role)) or token_text(special_map.get(role)) for role in ROLES}
    additional = [token_text(token) for token in config.get("additional_special_tokens") or ()]
    named = {*roles.values(), *additional}
    added = {token: (check_id(token, value, added_file), token in named) for token, value in added_ids.items()}
    return TokenizerSettings(
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        **roles,
        additional_special_tokens=tuple(filter(None, additional)),
        add_bos_token=config.get("add_bos_token"),
        legacy=config.get("legacy"),
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        added_tokens=added | _decoder_tokens(own.get("added_tokens_decoder"), config_file),
    )


def read_file(path: Path, remedy: str = "copy it again") -> bytes:
    """Reads a tokenizer file without a byte order mark.

    Raises:
        UserError: the file is missing, empty, too large, unreadable or a Git LFS pointer.
    """
    if not path.is_file():
        raise UserError(f"tokenizer file {path}: not found; {remedy}")
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_FILE_BYTES:
            raise UserError(f"tokenizer file {path}: {size} bytes, expected 1 to {MAX_FILE_BYTES}; copy it again")
        contents = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"tokenizer file {path}: cannot be read ({error.strerror})") from None
    refuse_lfs_pointer(f"tokenizer file {path}", contents[:12])
    return contents


def read_mapping(path: Path, remedy: str = "copy it again") -> dict[str, Any]:
    """Reads a JSON mapping.

    Raises:
        UserError: as in `read_file`, the file is not a JSON mapping, or one of added tokens has a token twice.
    """
    encoded = read_file(path, remedy)
    try:
        pairs = partial(_unique, path) if path.name == ADDED_TOKENS else None
        contents = json.loads(encoded.decode(), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer file {path}: cannot be read as UTF-8 ({error}); save it so") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer file {path}: not JSON ({' '.join(str(error).split())}); copy it again") from None
    if not isinstance(contents, dict):
        raise UserError(f"tokenizer file {path}: not a JSON mapping; {remedy}")
    return contents


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    for token, value in pairs:
        if table[token] != value:
            what = f"gives {reprlib.repr(token)} the ids {reprlib.repr(value)} and {reprlib.repr(table[token])}"
            raise wrong_value(path, what, "one id for a token")
    return table


def wrong_value(file: str | Path, what: str, expected: str) -> UserError:
    """Returns the error for an invalid value."""
    return UserError(f"tokenizer file {file}: {what}; expected {expected}; copy it again")


def token_text(value: Any) -> str | None:
    """Returns the text of a token, which may be a mapping with `content`; None if it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def check_id(token: str, value: Any, file: str | Path) -> int:
    """Returns the id of a token. Raises UserError if it is not a valid id."""
    if type(value) is not int or not 0 <= value <= MAX_ID:
        what = f"the id of {reprlib.repr(token)} is {reprlib.repr(value)}"
        raise wrong_value(file, what, f"a whole number from 0 to {MAX_ID}")
    return value


def check_ids(ids: Any, file: str | Path) -> None:
    """Raises UserError unless the value is a mapping of tokens to ids."""
    if not isinstance(ids, dict):
        raise wrong_value(file, f"vocab is {reprlib.repr(ids)}", "a mapping of tokens to ids")
    if not ids:
        raise wrong_value(file, "vocab is empty", "a mapping of tokens to ids")
    for token, value in ids.items():
        check_id(token, value, file)


def check_added_tokens(tokens: Any, file: Path) -> None:
    """Raises UserError unless the `added_tokens` of a tokenizer.json are null or tokens with ids."""
    if not isinstance(tokens, list | None):
        raise wrong_value(file, f"added_tokens is {reprlib.repr(tokens)}", "a list")
    for number, token in enumerate(tokens or ()):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise wrong_value(file, f"added_tokens[{number}] is {reprlib.repr(token)}", "a mapping with content and id")
        check_id(token["content"], token.get("id"), file)


def check_ids_of_added_tokens(added: Mapping[str, int], vocabulary: Mapping[str, int], name: str) -> None:
    """Checks the ids of added tokens against each other and the vocabulary.

    Args:
        added: id of each added token.
        vocabulary: id of each other token.
        name: name of the tokenizer file, for messages.

    Raises:
        UserError: two tokens have one id, or an id is so large that most ids would be unused.
    """
    owners = {token_id: token for token, token_id in vocabulary.items()}
    num_tokens = len({*vocabulary, *added})
    for token, token_id in added.items():
        what = f"gives {reprlib.repr(token)} the id {token_id}"
        owner = owners.setdefault(token_id, token)
        if owner != token:
            what += f", which is that of {reprlib.repr(owner)}"
            raise wrong_value(file_of_added_token(token, Path(name)), what, "one token for an id")
        if token_id >= 2 * num_tokens:
            expected = f"ids that follow the {len(vocabulary)} tokens of the vocabulary"
            raise wrong_value(file_of_added_token(token, Path(name)), what, expected)


def refuse_gap(ids: Mapping[str, int], file: Path) -> None:
    """Raises UserError if ids before that of an added token belong to no token.

    Args:
        ids: id of each token, added ones too.
        file: the tokenizer file.
    """
    owners = {token_id: token for token, token_id in ids.items()}
    for missing, token_id in enumerate(sorted(owners)):
        if missing != token_id:
            what = f"gives {reprlib.repr(owners[token_id])} the id {token_id}, but no token has the id {missing}"
            raise wrong_value(file_of_added_token(owners[token_id], file), what, "ids without gaps")


def file_of_added_token(token: str, file: Path) -> Path:
    """Returns the file beside a tokenizer file that adds a token, or the tokenizer file."""
    config, added = file.with_name("tokenizer_config.json"), file.with_name(ADDED_TOKENS)
    if config.is_file() and token in _decoder_tokens(read_mapping(config).get("added_tokens_decoder"), config):
        return config
    return added if added.is_file() and token in read_mapping(added) else file


def _check_settings(contents: Mapping[str, Any], file: Path) -> None:
    for role in ROLES:
        if contents.get(role) is not None:
            _check_token(contents[role], role, file)
    additional = contents.get("additional_special_tokens")
    if not isinstance(additional, list | None):
        raise wrong_value(file, f"additional_special_tokens is {reprlib.repr(additional)}", "a list of tokens")
    for number, token in enumerate(additional or ()):
        _check_token(token, f"additional_special_tokens[{number}]", file)
    for flag in FLAGS:
        if not isinstance(contents.get(flag), bool | None):
            raise wrong_value(file, f"{flag} is {reprlib.repr(contents[flag])}", "true, false or null")
    if not isinstance(contents.get("tokenizer_class"), str | None):
        raise wrong_value(file, f"tokenizer_class is {reprlib.repr(contents['tokenizer_class'])}", "text")


def _check_token(value: Any, key: str, file: Path) -> None:
    if token_text(value) is None:
        raise wrong_value(file, f"{key} is {reprlib.repr(value)}", "a token: text, or a mapping with content")


def _decoder_tokens(table: Any, file: Path) -> dict[str, tuple[int, bool]]:
    """Returns the id and `special` of the tokens of `added_tokens_decoder`, by their texts."""
    if not isinstance(table, dict | None):
        raise wrong_value(file, f"added_tokens_decoder is {reprlib.repr(table)}", "a mapping of ids to tokens")
    found = {}
    for number, token in (table or {}).items():
        # Python does not convert very long digit strings
        if not (number.isascii() and number.isdecimal() and len(number) <= len(str(MAX_ID))):
            raise wrong_value(file, f"added_tokens_decoder names {reprlib.repr(number)}", f"an id from 0 to {MAX_ID}")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise wrong_value(file, f"added_tokens_decoder.{number} is {reprlib.repr(token)}", "a mapping with content")
        found[token["content"]] = (check_id(token["content"], int(number), file), bool(token.get("special")))
    return found
