"""Which characters a font file has: its cmap table (OpenType specification, formats 4 and 12)."""

import struct
from pathlib import Path

import numpy as np

from mindvlm.core.errors import UserError

_UNICODE_TABLES = {(3, 10): 0, (0, 6): 1, (0, 4): 2, (3, 1): 3, (0, 3): 4, (0, 2): 5, (0, 1): 6, (0, 0): 7}


def covered_characters(path: str | Path) -> frozenset[str]:
    """Characters with a glyph; of a collection, those of its first font.

    Raises:
        UserError: the file is no font, or has no Unicode table.
    """
    try:
        data = Path(path).read_bytes()
        start = struct.unpack_from(">I", data, 12)[0] if data[:4] == b"ttcf" else 0
        cmap = _table(data, start, b"cmap")
        subtables = [struct.unpack_from(">HHI", data, cmap + 4 + 8 * i) for i in range(_uint16(data, cmap + 2))]
        ranks = [(_UNICODE_TABLES.get((system, encoding)), offset) for system, encoding, offset in subtables]
        known = [(rank, offset) for rank, offset in ranks if rank is not None]
        for _, offset in sorted(known):
            read = {4: _format_4, 12: _format_12}.get(_uint16(data, cmap + offset))
            if read:
                return frozenset(chr(code) for code in read(data, cmap + offset) if not 0xD800 <= code < 0xE000)
    except (OSError, struct.error, ValueError, StopIteration):
        pass
    raise UserError(f"font {path}: its table of characters cannot be read; take the file out of the fonts folder")


def _uint16(data: bytes, position: int) -> int:
    return struct.unpack_from(">H", data, position)[0]


def _table(data: bytes, start: int, tag: bytes) -> int:
    records = (struct.unpack_from(">4sIII", data, start + 12 + 16 * i) for i in range(_uint16(data, start + 4)))
    return next(offset for name, _, offset, _ in records if name == tag)


def _format_4(data: bytes, start: int) -> list[int]:
    count = _uint16(data, start + 6) // 2
    arrays = [np.frombuffer(data, ">u2", count, start + 14 + skip) for skip in (0, 2 * count + 2, 4 * count + 2)]
    ends, firsts, deltas = (array.astype(int).tolist() for array in arrays)
    offsets_at = start + 16 + 6 * count
    offsets = np.frombuffer(data, ">u2", count, offsets_at).tolist()
    codes = []
    for i, (first, end, delta, offset) in enumerate(zip(firsts, ends, deltas, offsets, strict=True)):
        for code in range(first, min(end, 0xFFFE) + 1):
            glyph = (code + delta) & 0xFFFF
            if offset:
                glyph = _uint16(data, offsets_at + 2 * i + offset + 2 * (code - first))
            if glyph:
                codes.append(code)
    return codes


def _format_12(data: bytes, start: int) -> list[int]:
    (count,) = struct.unpack_from(">I", data, start + 12)
    groups = np.frombuffer(data, ">u4", 3 * count, start + 16).reshape(count, 3).tolist()
    return [
        code for first, end, glyph in groups for code in range(first, min(end, 0x10FFFF) + 1) if glyph + code - first
    ]
