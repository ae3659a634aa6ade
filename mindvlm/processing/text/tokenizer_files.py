"""Opening of the tokenizer of a checkpoint folder, in any of its file formats."""

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Style, Tokenizer
from mindvlm.processing.text.tokenizer_settings import (
    RANK_PATTERNS,
    TokenizerSettings,
    check_ids_of_added_tokens,
    read_settings,
    wrong_value,
)
from mindvlm.processing.text.vocabulary import (
    Vocabulary,
    byte_level_vocabulary,
    piece_definition,
    rank_vocabulary,
    read_definition,
    read_piece_model,
    read_rank_file,
)

PIECE_MODEL, DEFINITION, VOCABULARY = "tokenizer.model", "tokenizer.json", "vocab.json"

ARCADE_SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
    *("<|endofprompt|>", TURN_START, TURN_END, "<|pause|>"),
    *(f"<|reg{number}|>" for number in range(8)),
    "<|extra0|>",
)
"""Control tokens of the Arcade100k vocabulary of StableLM-2, after the ranks and one unused id."""

ARCADE_NUM_UNUSED = 1


def open_tokenizer(path: str | Path, *, more_special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Opens the first of tokenizer.model, tokenizer.json, an Arcade100k rank file, and vocab.json.

    Settings come from the JSON files beside it (tokenizer_config.json, special_tokens_map.json, added_tokens.json).

    Args:
        path: the folder, or one of these files.
        more_special_tokens: control tokens to add if the vocabulary lacks them.

    Raises:
        UserError: there is no tokenizer, a file is damaged, or tokens cannot be added to the vocabulary.
    """
    file = find_tokenizer(Path(path))
    settings, name = read_settings(file.parent), str(file)
    if file.name.endswith(".model"):
        style: Style = "continuous" if settings.legacy is False else "legacy"
        return llama_tokenizer(read_piece_model(file), settings, style, more_special_tokens, name=name)
    if not file.name.endswith(".json"):
        lacking = [token for token in more_special_tokens if token not in ARCADE_SPECIAL_TOKENS]
        if lacking:
            raise UserError(f"tokenizer file {file}: cannot add the token {lacking[0]!r}; its vocabulary is closed")
        vocabulary = rank_vocabulary(read_rank_file(file), num_unused=ARCADE_NUM_UNUSED, name=file.name)
        return Tokenizer(vocabulary, ARCADE_SPECIAL_TOKENS)
    definition = read_definition(file)
    added = {
        token["content"]: (token["id"], bool(token.get("special"))) for token in definition.get("added_tokens") or ()
    }
    settings = replace(settings, added_tokens={**added, **settings.added_tokens})
    if not definition["model"].get("byte_fallback"):
        return byte_level_tokenizer(definition, settings, more_special_tokens, name=name)
    style = "continuous" if settings.legacy is False and not settings.is_fast else "fast"
    vocabulary = piece_definition(definition, name)
    if style == "continuous":
        # SentencePiece, which that class runs, adds its space whatever the text begins with
        vocabulary = replace(vocabulary, adds_second_space=True)
    return llama_tokenizer(vocabulary, settings, style, more_special_tokens, definition=definition, name=name)


def find_tokenizer(path: Path) -> Path:
    """Returns the tokenizer file of a folder; returns a file unchanged.

    Raises:
        UserError: there is no such folder, or it has no tokenizer.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file or folder; copy it there or set its key in processor")
        return path
    ranks = [found for pattern in RANK_PATTERNS for found in sorted(path.glob(pattern))]
    for found in [path / PIECE_MODEL, path / DEFINITION, *ranks, path / VOCABULARY]:
        if found.is_file():
            return found
    raise UserError(
        f"tokenizer folder {path}: has none of {PIECE_MODEL}, {DEFINITION}, {RANK_PATTERNS[0]}, {VOCABULARY}; "
        "copy the tokenizer files of the checkpoint into it"
    )


def llama_tokenizer(
    vocabulary: Vocabulary,
    settings: TokenizerSettings,
    style: Style,
    more_special_tokens: Sequence[str] = (),
    *,
    definition: Mapping[str, Any] | None = None,
    name: str = "tokenizer",
) -> Tokenizer:
    """Returns Llama's tokenizer. Tokens default to Llama's names.

    Args:
        definition: the tokenizer.json of the vocabulary, if any.
        name: name of the file, for messages.

    Raises:
        UserError: the vocabulary lacks a token of the settings, an added token has the id of another one, or the
            definition has invalid values.
    """
    definition = definition or {}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = replace(settings, **{role: getattr(settings, role) or token for role, token in roles.items()})
    added = {token: token_id for token, (token_id, _) in settings.added_tokens.items() if token not in vocabulary.ids}
    check_ids_of_added_tokens(added, vocabulary.ids, name)
    ids = added | dict(vocabulary.ids)
    control = [*settings.named_tokens, *settings.added_tokens]
    lacking = [token for token in control if token not in ids]
    if lacking:
        raise UserError(
            f"tokenizer file {name}: lacks the token {lacking[0]!r}; give the files that belong to the model"
        )
    prefix = _prefix(definition, ids, settings, name, default=(settings.bos_token or "",))
    control = list(dict.fromkeys([*control, *prefix, *more_special_tokens]))
    pre_tokenizer = definition.get("pre_tokenizer")
    spaces_first_text_only = isinstance(pre_tokenizer, dict) and pre_tokenizer.get("prepend_scheme") == "first"
    return Tokenizer(
        replace(vocabulary, ids=ids, num_ids=max(ids.values()) + 1),
        control,
        end_token=settings.eos_token or "",
        pad_token=settings.pad_token or settings.unk_token or "",
        prefix_tokens=prefix,
        style=style,
        continues_text=style == "continuous" or spaces_first_text_only,
        skipped_tokens=[*settings.named_tokens, *more_special_tokens],
        spaced_tokens=() if style == "fast" else [token for token in control if token not in vocabulary.ids],
    )


def byte_level_tokenizer(
    definition: Mapping[str, Any], settings: TokenizerSettings, more_special_tokens: Sequence[str] = (), *, name: str
) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with the added tokens of its files.

    Args:
        name: name of the file, for messages.

    Raises:
        UserError: the definition is not a complete byte-level BPE.
    """
    end_token = settings.eos_token or END_OF_TEXT
    added = [
        {"content": token, "id": token_id, "special": special}
        for token, (token_id, special) in settings.added_tokens.items()
    ]
    control = [token["content"] for token in added if token["special"]]
    control += [*settings.named_tokens, end_token, *more_special_tokens]
    vocabulary = byte_level_vocabulary({**definition, "added_tokens": added}, name, control=control)
    prefix = _prefix(definition, vocabulary.ids, settings, name)
    control = list(dict.fromkeys([*control, *prefix]))
    return Tokenizer(
        vocabulary,
        control,
        end_token=end_token,
        pad_token=settings.pad_token or settings.unk_token or end_token,
        prefix_tokens=prefix,
        spaced_tokens=() if settings.is_fast else [token for token in settings.added_tokens if token not in control],
        cleans_spaces=settings.clean_up_tokenization_spaces,
    )


def _prefix(
    definition: Mapping[str, Any],
    ids: Mapping[str, int],
    settings: TokenizerSettings,
    name: str,
    *,
    default: Sequence[str] = (),
) -> tuple[str, ...]:
    """Returns the prefix tokens, from `add_bos_token` or else from the template of the definition."""
    if settings.add_bos_token is not None:
        return (settings.bos_token,) if settings.add_bos_token and settings.bos_token else ()
    found = template_prefix(definition, name)
    for token, token_id in found.items():
        if ids.get(token) != token_id:
            what = f"post_processor gives {token!r} the id {reprlib.repr(token_id)}"
            raise wrong_value(name, what, f"that of the vocabulary, {ids.get(token)}")
    return tuple(found or default)


def template_prefix(definition: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the prefix tokens of the TemplateProcessing of a tokenizer.json, with their ids.

    Raises:
        UserError: the `post_processor` is not one of the tokenizers library.
    """
    processor = definition.get("post_processor")
    prefix: dict[str, Any] = {}
    try:
        steps = [] if processor is None else processor["processors"] if "processors" in processor else [processor]
        for step in steps:
            parts = step["single"] if step["type"] == "TemplateProcessing" else []
            for part in itertools.takewhile(lambda part: "SpecialToken" in part, parts):
                special = step["special_tokens"][part["SpecialToken"]["id"]]
                prefix |= zip(special["tokens"], special["ids"], strict=True)
    except (KeyError, TypeError, ValueError):
        what = f"post_processor is {reprlib.repr(processor)}"
        raise wrong_value(name, what, "null or a processor of the tokenizers library") from None
    return prefix
