"""What the JSON files beside a Hugging Face tokenizer say: which token has which part, and how text is joined."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer_values import ROLES, check_id, check_settings, decoder_tokens, token_text

RANK_PATTERNS = ("*.tiktoken", "*.tiktoken.txt")
"""Names of files of tiktoken's ranks."""

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
        UserError: one of them is no JSON mapping, or a value in it is of the wrong kind.
    """
    special_map, own = (_read(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    check_settings(special_map, folder / "special_tokens_map.json")
    check_settings(own, folder / "tokenizer_config.json")
    config = {**special_map, **own}
    roles = {role: token_text(config.get(role)) or token_text(special_map.get(role)) for role in ROLES}
    additional = [token_text(token) for token in config.get("additional_special_tokens") or ()]
    named = {*roles.values(), *additional}
    added_file = folder / "added_tokens.json"
    added = {token: (check_id(token, value, added_file), token in named) for token, value in _read(added_file).items()}
    added |= decoder_tokens(own, folder / "tokenizer_config.json")
    return TokenizerSettings(
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        **roles,
        additional_special_tokens=tuple(filter(None, additional)),
        add_bos_token=config.get("add_bos_token"),
        legacy=config.get("legacy"),
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        added_tokens=added,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"tokenizer file {path}: is no JSON ({' '.join(str(error).split())}); copy it again") from None
    if not isinstance(contents, dict):
        raise UserError(f"tokenizer file {path}: holds no mapping of settings; copy it again")
    return contents
