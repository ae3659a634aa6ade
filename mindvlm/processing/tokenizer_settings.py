"""What the JSON files beside a Hugging Face tokenizer say: which token has which part, and how text is joined."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindvlm.errors import UserError

RANK_PATTERNS = ("*.tiktoken", "*.tiktoken.txt")
"""Names of files of tiktoken's ranks."""

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
MAX_SETTINGS_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Settings of a tokenizer.

    Attributes:
        tokenizer_class: class of transformers, '' if not said.
        bos_token, eos_token, unk_token, pad_token: None if there is none.
        additional_special_tokens: further tokens that have no text.
        add_bos_token: whether every text begins with `bos_token`; None if not said.
        legacy: Llama's old treatment of text behind control tokens; None if not said.
        clean_up_tokenization_spaces: whether decoding drops spaces before punctuation.
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
        """The tokens that decoding leaves out, each once."""
        roles = [token for token in (self.bos_token, self.eos_token, self.unk_token, self.pad_token) if token]
        return tuple(dict.fromkeys([*roles, *self.additional_special_tokens]))

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer is one of the "fast" classes, which do not set added tokens apart in decoded text."""
        return self.tokenizer_class.endswith("Fast")


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json, as far as the folder has them.

    Raises:
        UserError: one of them is no JSON mapping.
    """
    config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    special_map = _read(folder / "special_tokens_map.json")
    roles = {role: _content(config.get(role)) or _content(special_map.get(role)) for role in ROLES}
    file = folder / "tokenizer_config.json"
    additional = _of_kind(config.get("additional_special_tokens") or [], list, "additional_special_tokens", file)
    named = {*roles.values(), *map(_content, additional)}
    added_file = folder / "added_tokens.json"
    added = {token: (_id(number, added_file), token in named) for token, number in _read(added_file).items()}
    for number, token in _of_kind(config.get("added_tokens_decoder") or {}, dict, "added_tokens_decoder", file).items():
        if isinstance(token, dict) and "content" in token:
            content = _of_kind(token["content"], str, "content of an added token", file)
            added[content] = (_id(number, file), bool(token.get("special")))
    return TokenizerSettings(
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        **roles,
        additional_special_tokens=tuple(token for token in map(_content, additional) if token),
        add_bos_token=config.get("add_bos_token"),
        legacy=config.get("legacy"),
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        added_tokens=added,
    )


def _of_kind(value: Any, kind: type, what: str, file: Path) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"tokenizer file {file}: {what} is {value!r:.80}, expected a {kind.__name__}; copy it again")
    return value


def _id(number: Any, file: Path) -> int:
    """The id of an added token, which is a text where it is a key."""
    try:
        return int(number)
    except (TypeError, ValueError):
        raise UserError(
            f"tokenizer file {file}: an added token has the id {number!r:.80}, expected a number; copy it again"
        ) from None


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"tokenizer file {path}: is no JSON ({' '.join(str(error).split())}); copy it again") from None
    if not isinstance(contents, dict):
        raise UserError(f"tokenizer file {path}: holds no mapping of settings; copy it again")
    return contents
