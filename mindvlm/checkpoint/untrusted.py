"""Checks of what files claim: names, shapes and JSON tables from files that may be damaged or hostile."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.dtypes import block_size, item_size
from mindvlm.checkpoint.source import TensorInfo
from mindvlm.core.errors import UserError

MAX_TENSORS = 100_000
MAX_JSON_BYTES = 12 * 1024 * 1024
_MIN_BYTES_PER_BRACKET = 12
_MAX_NAME = 512
_MAX_AXES = 32
_MAX_BYTES = 1 << 62


def quoted(value: object) -> str:
    """Returns a printable, short form of any value from a file, for messages."""
    if not isinstance(value, str):
        return repr(value) if type(value) in (int, float, bool, type(None)) else f"a {type(value).__name__}"
    return repr(value) if len(value) <= 80 else f"{value[:80]!r}..."


def refuse_lfs_pointer(path: str | Path, head: bytes) -> None:
    """Raises UserError if a file that begins with `head` is a Git LFS pointer."""
    if head.startswith(b"version http"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def check_info(path: Path, info: TensorInfo) -> None:
    """Raises UserError unless an array of this shape can exist and its name is printable."""
    if not info.name or len(info.name) > _MAX_NAME or not info.name.isprintable():
        raise UserError(
            f"{path}: holds a tensor with the empty, overlong or unprintable name {quoted(info.name)}; "
            f"the file is damaged, copy or download it again"
        )
    extent = math.prod(max(axis, 1) for axis in info.shape) * item_size(info.dtype) // block_size(info.dtype)
    if len(info.shape) > _MAX_AXES or extent >= _MAX_BYTES:
        raise UserError(
            f"{path}: tensor {quoted(info.name)} has an impossible shape; "
            f"the file is damaged, copy or download it again"
        )


def parse_json_table(path: Path, encoded: bytes, *, what: str, remedy: str) -> dict[str, Any]:
    """Parses a JSON table; `what` and `remedy` become part of error messages.

    Raises:
        UserError: not JSON, not a table, a duplicate key, or so many nested tables and lists that a small text would
            become large in memory.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise UserError(f"{path}: {what} names {quoted(key)} twice; {remedy}")
            table[key] = value
        return table

    refuse_lfs_pointer(path, encoded)
    brackets = encoded.count(b"[") + encoded.count(b"{")
    if len(encoded) > MAX_JSON_BYTES or brackets * _MIN_BYTES_PER_BRACKET > len(encoded) + 1024:
        raise UserError(f"{path}: {what} has {len(encoded)} bytes and {brackets} tables or lists, too many; {remedy}")
    try:
        table = json.loads(encoded.removeprefix(codecs.BOM_UTF8).decode("utf-8"), object_pairs_hook=unique)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} is not UTF-8 text; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not JSON; {remedy}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: {what} is not a table; {remedy}")
    return table
