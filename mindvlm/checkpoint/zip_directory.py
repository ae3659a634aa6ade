"""Locates the entries of an uncompressed zip file, with limits and checks against the file.

Python's zipfile reads a directory of any size into memory, and tolerates errors that torch.save never makes.
Source of the format: PKWARE's APPNOTE.TXT, sections 4.3.6 to 4.3.16.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from mindvlm.checkpoint.stored import Segment
from mindvlm.checkpoint.untrusted import MAX_TENSORS, quoted
from mindvlm.core.errors import UserError

_DAMAGED = "the file is truncated or damaged, copy or download it again"
_MAX_DIRECTORY_BYTES = 64 * 1024 * 1024
_END, _END64, _LOCATOR64, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_UNKNOWN16, _UNKNOWN32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _UTF8 = 1, 0x800


def read_zip(path: Path, file: BinaryIO) -> dict[str, Segment]:
    """Returns the bytes of every entry by name, in the order of the directory.

    Raises:
        UserError: no complete zip file; compressed, encrypted, duplicate or overlapping entries; entries or a
            directory that lie elsewhere than claimed.
    """
    size = path.stat().st_size
    count, begin, end = _directory(path, file, size)
    data = _at(file, begin, end - begin)
    entries: dict[str, Segment] = {}
    position = 0
    for _ in range(count):
        head = data[position : position + 46]
        if len(head) != 46 or head[:4] != _ENTRY:
            raise UserError(f"{path}: its directory of entries is broken; {_DAMAGED}")
        flags, method = struct.unpack("<HH", head[8:12])
        packed, unpacked, name_bytes, extra_bytes, comment_bytes = struct.unpack("<IIHHH", head[20:34])
        offset = struct.unpack("<I", head[42:46])[0]
        encoded = data[position + 46 : position + 46 + name_bytes]
        extra = data[position + 46 + name_bytes : position + 46 + name_bytes + extra_bytes]
        position += 46 + name_bytes + extra_bytes + comment_bytes
        name = encoded.decode("utf-8" if flags & _UTF8 else "cp437", "replace")
        if flags & _ENCRYPTED or method != 0:
            raise UserError(f"{path}: holds compressed entries, which torch.save never writes; save the weights again")
        unpacked, packed, offset = _long_fields(path, extra, (unpacked, packed, offset))
        if packed != unpacked:
            raise UserError(f"{path}: the entry {quoted(name)} claims two sizes; {_DAMAGED}")
        if name in entries:
            raise UserError(f"{path}: holds the entry {quoted(name)} twice; {_DAMAGED}")
        entries[name] = _located(path, file, name, encoded, offset, unpacked, begin)
    if position != len(data):
        raise UserError(f"{path}: its directory of entries is broken; {_DAMAGED}")
    _refuse_overlaps(path, entries)
    return entries


def _directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Returns the number of entries and where the directory begins and ends."""
    tail = _at(file, max(0, size - 22 - _UNKNOWN16), min(size, 22 + _UNKNOWN16))
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22 or struct.unpack("<H", tail[at + 20 : at + 22])[0] != len(tail) - at - 22:
        raise UserError(f"{path}: not a complete PyTorch file; {_DAMAGED}")
    count, length, begin = struct.unpack("<HII", tail[at + 10 : at + 20])
    end = size - len(tail) + at
    locator = _at(file, max(0, end - 20), 20)
    if locator[:4] == _LOCATOR64:
        position = struct.unpack("<Q", locator[8:16])[0]
        record = _at(file, position, 56) if position <= size else b""
        if len(record) != 56 or record[:4] != _END64:
            raise UserError(f"{path}: its directory of entries is not where it should be; {_DAMAGED}")
        count, length, begin = struct.unpack("<QQQ", record[32:56])
        end = position
    if begin + length != end or count > MAX_TENSORS * 2 or length > _MAX_DIRECTORY_BYTES:
        raise UserError(f"{path}: its directory of entries is not where it should be, or too large; {_DAMAGED}")
    return count, begin, end


def _long_fields(path: Path, extra: bytes, fields: tuple[int, ...]) -> list[int]:
    """Replaces the fields that do not fit in 32 bits with those of the zip64 record."""
    longs = b""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            longs = extra[4 : 4 + length]
            break
        extra = extra[4 + length :]
    values = []
    for value in fields:
        if value == _UNKNOWN32:
            if len(longs) < 8:
                raise UserError(f"{path}: an entry has no size or place; {_DAMAGED}")
            value, longs = struct.unpack("<Q", longs[:8])[0], longs[8:]
        values.append(value)
    return values


def _located(path: Path, file: BinaryIO, name: str, encoded: bytes, offset: int, num_bytes: int, limit: int) -> Segment:
    local = _at(file, offset, 30) if offset < limit else b""
    if len(local) != 30 or local[:4] != _LOCAL:
        raise UserError(f"{path}: the entry {quoted(name)} is not where it should be; {_DAMAGED}")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    begin = offset + 30 + name_bytes + extra_bytes
    if file.read(name_bytes) != encoded:
        raise UserError(f"{path}: the entry {quoted(name)} is stored under another name; {_DAMAGED}")
    if begin + num_bytes > limit:
        raise UserError(f"{path}: the entry {quoted(name)} goes beyond the end of the file; {_DAMAGED}")
    return Segment(path, begin, num_bytes)


def _refuse_overlaps(path: Path, entries: dict[str, Segment]) -> None:
    end = 0
    for segment in sorted((s for s in entries.values() if s.num_bytes), key=lambda s: s.offset):
        if segment.offset < end:
            raise UserError(f"{path}: its entries overlap; {_DAMAGED}")
        end = segment.offset + segment.num_bytes


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
