"""The small files beside the weights of a model folder: config, tokenizer, image processor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mindvlm.checkpoint import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.processing.text.tokenizer_settings import RANK_PATTERNS

PATTERNS = (
    "config.json",
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


def read_companions(source: Path, extra: Sequence[str] = ()) -> dict[str, bytes]:
    """Returns the companion files in `source`, by name.

    Args:
        source: folder of the model.
        extra: further names, see `ConvertibleModel.companions`.

    Raises:
        UserError: a file cannot be read.
    """
    found = {}
    for file in sorted({file for pattern in (*PATTERNS, *extra) for file in source.glob(pattern)}):
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            continue
        try:
            found[file.name] = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    return found


def copy_companions(
    source: Path, target: Path, extra: Sequence[str] = (), *, without: Collection[str] = ()
) -> tuple[Path, ...]:
    """Copies the companion files in `source` into the folder `target`, except those in `without`; returns the copies.

    See `read_companions`.

    Raises:
        UserError: a file cannot be read or written.
    """
    copied = []
    for name, content in read_companions(source, extra).items():
        if name in without:
            continue
        with atomic_file(target / name) as opened:
            opened.write(content)
        copied.append(target / name)
    return tuple(copied)
