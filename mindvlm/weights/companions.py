"""The small files that make a folder of weights a model folder: config, tokenizer, image processor."""

from __future__ import annotations

from pathlib import Path

from mindvlm.checkpoint import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer_settings import RANK_PATTERNS

PATTERNS = (
    "config.json",
    "vision_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    *RANK_PATTERNS,
)
_MAX_BYTES = 64 * 1024 * 1024


def read_companions(source: Path) -> dict[str, bytes]:
    """Return what `source` has of such files, by name.

    Raises:
        UserError: a file cannot be read.
    """
    found = {}
    for file in sorted({file for pattern in PATTERNS for file in source.glob(pattern)}):
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            continue
        try:
            found[file.name] = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    return found


def copy_companions(source: Path, target: Path) -> tuple[Path, ...]:
    """Copy what `source` has of such files into the folder `target`.

    Raises:
        UserError: a file cannot be read or written.
    """
    copied = []
    for name, content in read_companions(source).items():
        with atomic_file(target / name) as opened:
            opened.write(content)
        copied.append(target / name)
    return tuple(copied)
