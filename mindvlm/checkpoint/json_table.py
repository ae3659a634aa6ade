"""JSON from files that nobody vouches for: bounded memory, no key twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.stored import quoted
from mindvlm.core.errors import UserError

MAX_JSON_BYTES = 12 * 1024 * 1024
_MIN_BYTES_PER_BRACKET = 12


def parse_json_table(path: Path, encoded: bytes, *, what: str, remedy: str) -> dict[str, Any]:
    """Return the table that `encoded` holds; `what` and `remedy` word the message.

    Raises:
        UserError: not JSON, not a table, a key twice, or so many nested tables and lists that a small text becomes
            large in memory.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise UserError(f"{path}: {what} names {quoted(key)} twice; {remedy}")
            table[key] = value
        return table

    brackets = encoded.count(b"[") + encoded.count(b"{")
    if len(encoded) > MAX_JSON_BYTES or brackets * _MIN_BYTES_PER_BRACKET > len(encoded) + 1024:
        raise UserError(f"{path}: {what} has {len(encoded)} bytes and {brackets} tables or lists, too many; {remedy}")
    try:
        table = json.loads(encoded.decode("utf-8"), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not JSON; {remedy}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: {what} is not a table; {remedy}")
    return table
