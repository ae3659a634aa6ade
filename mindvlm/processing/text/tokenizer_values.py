"""What the values of a tokenizer's JSON files may be; the errors name the file and the key.

Every function takes the file's path or name for the message, and raises UserError for a value of the wrong kind.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError

MAX_ID = 2**31 - 1
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("add_bos_token", "legacy", "clean_up_tokenization_spaces")


def wrong(file: str | Path, what: str, expected: str) -> UserError:
    return UserError(f"tokenizer file {file}: {what}; expected {expected}; copy it again")


def token_text(value: Any) -> str | None:
    """The text of a token, which may be a mapping with `content`; None if it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def check_settings(contents: Mapping[str, Any], file: Path) -> None:
    """Checks tokenizer_config.json or special_tokens_map.json, as far as it is read."""
    for role in ROLES:
        _check_token(contents.get(role), role, file, may_be_null=True)
    additional = contents.get("additional_special_tokens")
    if not isinstance(additional, list | None):
        raise wrong(file, f"additional_special_tokens is {reprlib.repr(additional)}", "a list of tokens")
    for number, token in enumerate(additional or ()):
        _check_token(token, f"additional_special_tokens[{number}]", file)
    for flag in FLAGS:
        if not isinstance(contents.get(flag), bool | None):
            raise wrong(file, f"{flag} is {reprlib.repr(contents[flag])}", "true, false or null")
    if not isinstance(contents.get("tokenizer_class"), str | None):
        raise wrong(file, f"tokenizer_class is {reprlib.repr(contents['tokenizer_class'])}", "text")


def _check_token(value: Any, key: str, file: Path, *, may_be_null: bool = False) -> None:
    if token_text(value) is None and not (may_be_null and value is None):
        raise wrong(file, f"{key} is {reprlib.repr(value)}", "a token: text, or a mapping with content")


def decoder_tokens(contents: Mapping[str, Any], file: Path) -> dict[str, tuple[int, bool]]:
    """Id and `special` of the tokens of `added_tokens_decoder`, by their texts."""
    table = contents.get("added_tokens_decoder")
    if not isinstance(table, dict | None):
        raise wrong(file, f"added_tokens_decoder is {reprlib.repr(table)}", "a mapping of ids to tokens")
    found = {}
    for number, token in (table or {}).items():
        # more digits than this are no id, and too many of them are no number to Python
        if not (number.isascii() and number.isdecimal() and len(number) <= len(str(MAX_ID))):
            raise wrong(file, f"added_tokens_decoder names {reprlib.repr(number)}", f"an id from 0 to {MAX_ID}")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise wrong(file, f"added_tokens_decoder.{number} is {reprlib.repr(token)}", "a mapping with content")
        found[token["content"]] = (check_id(token["content"], int(number), file), bool(token.get("special")))
    return found


def check_id(token: str, value: Any, file: str | Path) -> int:
    """The id of a token."""
    if type(value) is not int or not 0 <= value <= MAX_ID:
        what = f"the id of {reprlib.repr(token)} is {reprlib.repr(value)}"
        raise wrong(file, what, f"a whole number from 0 to {MAX_ID}")
    return value


def check_ids(ids: Any, file: str | Path) -> None:
    """Checks a mapping of tokens to ids."""
    if not isinstance(ids, dict):
        raise wrong(file, f"vocab is {reprlib.repr(ids)}", "a mapping of tokens to ids")
    if not ids:
        raise wrong(file, "vocab is empty", "a mapping of tokens to ids")
    for token, value in ids.items():
        check_id(token, value, file)


def check_added_tokens(tokens: Any, file: Path) -> None:
    """Checks the `added_tokens` of a tokenizer.json."""
    if not isinstance(tokens, list | None):
        raise wrong(file, f"added_tokens is {reprlib.repr(tokens)}", "a list")
    for number, token in enumerate(tokens or ()):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise wrong(file, f"added_tokens[{number}] is {reprlib.repr(token)}", "a mapping with content and id")
        check_id(token["content"], token.get("id"), file)
