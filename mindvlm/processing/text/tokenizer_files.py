"""The tokenizer of a checkpoint folder, whichever files it has."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.processing.text.bpe_tokenizer import BpeTokenizer, read_definition
from mindvlm.processing.text.llama_tokenizer import LlamaTokenizer, piece_vocabulary, read_piece_model
from mindvlm.processing.text.tiktoken_tokenizer import (
    ARCADE_NUM_UNUSED,
    ARCADE_SPECIAL_TOKENS,
    END_OF_TEXT,
    TiktokenTokenizer,
)
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.tokenizer_settings import RANK_PATTERNS, TokenizerSettings, read_settings

PIECE_MODEL, DEFINITION, VOCABULARY = "tokenizer.model", "tokenizer.json", "vocab.json"


def open_tokenizer(path: str | Path, *, more_special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Llama's from tokenizer.model, else what tokenizer.json says, else an Arcade100k rank file, else vocab.json.

    Settings come from the JSON files beside it (tokenizer_config.json, special_tokens_map.json, added_tokens.json).

    Args:
        path: the folder, or one of these files.
        more_special_tokens: control tokens that get the next ids where the vocabulary lacks them.

    Raises:
        UserError: there is no tokenizer, a file is damaged, or the vocabulary takes no more tokens.
    """
    file = find_tokenizer(Path(path))
    settings = read_settings(file.parent)
    if file.name.endswith(".model"):
        style = "continuous" if settings.legacy is False else "legacy"
        settings = llama_settings(settings)
        return LlamaTokenizer(
            read_piece_model(file), settings, style=style, more_special_tokens=more_special_tokens, name=str(file)
        )
    if not file.name.endswith(".json"):
        return open_rank_file(file, more_special_tokens)
    definition = read_definition(file)
    try:
        tokens = definition.get("added_tokens") or ()
        added = {str(token["content"]): (int(token["id"]), bool(token.get("special", False))) for token in tokens}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"tokenizer file {file}: added_tokens is no list of tokens with ids; copy it again") from None
    settings = replace(settings, added_tokens={**added, **settings.added_tokens})
    if definition["model"].get("byte_fallback"):
        style = "continuous" if settings.legacy is False and not settings.is_fast else "fast"
        vocabulary = piece_vocabulary(definition, str(file))
        settings = llama_settings(settings)
        return LlamaTokenizer(
            vocabulary, settings, style=style, more_special_tokens=more_special_tokens, name=str(file)
        )
    return bpe_tokenizer(definition, settings, more_special_tokens, str(file))


def find_tokenizer(path: Path) -> Path:
    """The file of a folder that its tokenizer is read from; a file is returned as it is.

    Raises:
        UserError: no such folder, or it has none.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file or folder; give the folder of the checkpoint")
        return path
    ranks = [found for pattern in RANK_PATTERNS for found in sorted(path.glob(pattern))]
    for found in [path / PIECE_MODEL, path / DEFINITION, *ranks, path / VOCABULARY]:
        if found.is_file():
            return found
    raise UserError(
        f"tokenizer folder {path}: has none of {PIECE_MODEL}, {DEFINITION}, {RANK_PATTERNS[0]}, {VOCABULARY}; "
        "copy the tokenizer files of the checkpoint into it"
    )


def llama_settings(settings: TokenizerSettings) -> TokenizerSettings:
    """Llama's own names for the tokens that the settings leave open."""
    return replace(
        settings,
        bos_token=settings.bos_token or "<s>",
        eos_token=settings.eos_token or "</s>",
        unk_token=settings.unk_token or "<unk>",
    )


def open_rank_file(file: Path, more_special_tokens: Sequence[str]) -> TiktokenTokenizer:
    """The Arcade100k tokenizer of StableLM-2."""
    lacking = [token for token in more_special_tokens if token not in ARCADE_SPECIAL_TOKENS]
    if lacking:
        raise UserError(f"tokenizer file {file}: takes no further token {lacking[0]!r}; its vocabulary is closed")
    return TiktokenTokenizer.from_file(file, special_tokens=ARCADE_SPECIAL_TOKENS, num_unused=ARCADE_NUM_UNUSED)


def bpe_tokenizer(
    definition: dict[str, Any], settings: TokenizerSettings, more_special_tokens: Sequence[str], name: str
) -> BpeTokenizer:
    """A byte-level BPE tokenizer with the added tokens of its files, such as the runs of spaces of Phi-2."""
    end_token = settings.eos_token or END_OF_TEXT
    begins = settings.bos_token and settings.add_bos_token is True
    added = [
        {"content": token, "id": token_id, "special": special, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, (token_id, special) in sorted(settings.added_tokens.items(), key=lambda item: item[1][0])
    ]
    control = [token for token, (_, special) in settings.added_tokens.items() if special]
    return BpeTokenizer(
        {**definition, "added_tokens": added},
        special_tokens=list(dict.fromkeys([*control, *settings.named_tokens, end_token, *more_special_tokens])),
        prefix_tokens=(settings.bos_token,) if begins else (),
        end_token=end_token,
        pad_token=settings.pad_token or settings.unk_token or end_token,
        stripping_tokens=(),
        sets_added_apart=not settings.is_fast,
        cleans_spaces=settings.clean_up_tokenization_spaces,
        allow_unused_ids=True,
        name=name,
    )
