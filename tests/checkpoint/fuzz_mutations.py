"""Mutations that know the formats: JSON headers, zip entries, pickle instructions and protobuf fields."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_VALUES = (None, True, "", "F32", "F9", "\ud800", "a\nb", "../x.bin", "/etc/passwd", [], {}, [0], [[]], -1, 1.5, 1e308,
           float("nan"), *_NUMBERS)  # fmt: skip
_PICKLE_PIECES = (
    b"cos\nsystem\n", b"X\x02\x00\x00\x00id", b"\x85R", b"\x81", b"(S'id'\nios\nsystem\n", b"o", b"b", b"\x82\x01",
    b"\x83\x01\x00", b"\x93", b"\x8c\x02os", b"\x8c\x06system", b"cbuiltins\neval\n", b"}", b"]", b")", b"(", b"N",
    b"t", b"u", b"s", b"e", b"a", b"0", b"1", b"2", b"Q", b"R", b".", b"\x94", b"h\x00", b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\x7f", b"K\x00", b"J\xff\xff\xff\xff", b"M\xff\xff", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8a\xff" + b"\x7f" * 255, b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\x86", b"\x87", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nfloat64\n", b"\x8f", b"\x91", b"\x97", b"\x98",
    b"B\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b")" + b"\x85" * 2000, b"]" + b"2a" * 50,
    b"(" * 500, b"}2K\x00Ns",
)  # fmt: skip


def mutate(corpus: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """Return the files of one case, the one to open first."""
    name = rng.choice(sorted(corpus))
    content = corpus[name]
    kind = name.rsplit(".", 1)[1]
    if rng.random() < 0.1:
        return _index_case(corpus, rng)
    structural: Callable[[bytes, random.Random], bytes]
    if kind == "safetensors":
        structural = _safetensors
    elif kind == "ckpt":
        structural = _protobuf
    elif content[:2] == b"PK":
        structural = _zip
    else:
        structural = _pickle
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = structural(content, rng) if rng.random() < 0.7 else damage(content, rng)
    if rng.random() < 0.02:
        content = damage(corpus[rng.choice(sorted(corpus))], rng)
    return {f"case.{kind}": content}


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change bytes without regard to what they mean."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(7)
        if action == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 2:
            code = rng.choice("BHIQ")
            packed = struct.pack("<" + code, rng.choice(_NUMBERS) & (256 ** struct.calcsize("<" + code) - 1))
            data[at : at + len(packed)] = packed
        elif action == 3:
            del data[at : at + rng.choice((1, 2, 4, 8, 64))]
        elif action == 4:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif action == 5:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.choice((4, 16, 64, 256))]
        else:
            del data[at:]
    return bytes(data)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return damage(content, rng)
    encoded = json.dumps(_json(header, rng)).encode()
    if rng.random() < 0.1:
        encoded = damage(encoded, rng)
    claimed = len(encoded) if rng.random() < 0.9 else rng.choice(_NUMBERS)
    return struct.pack("<Q", claimed) + encoded + content[8 + length :]


def _json(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, copy or rename one node of a JSON tree."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        action = rng.random()
        if action < 0.1:
            del tree[key]
        elif action < 0.2 and isinstance(tree, dict):
            tree[rng.choice(("", "__metadata__", "x\n", "dtype", "weight_map", *tree))] = tree[key]
        elif action < 0.2:
            tree.extend([tree[key]] * rng.choice((1, 40)))
        else:
            tree[key] = _json(tree[key], rng)
        return tree
    if type(tree) is int and rng.random() < 0.6:
        return tree + rng.choice((-8, -4, -1, 1, 4, 8, 2**32, -(2**63)))
    return rng.choice(_VALUES)


def _zip(content: bytes, rng: random.Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:
        return damage(content, rng)
    for index, (name, data) in enumerate(entries):
        if name.endswith("data.pkl"):
            entries[index] = (name, _pickle(data, rng))
        elif rng.random() < 0.05:
            entries[index] = (
                rng.choice((name, "../" + name, "/" + name, name + "/", "data.pkl", "x/data.pkl")),
                damage(data, rng),
            )
        elif rng.random() < 0.05:
            entries.append((name, data))
    target = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return target.getvalue()


def _pickle(content: bytes, rng: random.Random) -> bytes:
    """Insert, remove, repeat or replace instructions; what follows the pickle stays."""
    starts = []
    try:
        for _, _, position in pickletools.genops(content):
            starts.append(position)
    except Exception:
        pass
    if len(starts) < 3:
        return damage(content, rng)
    pieces = [content[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    rest = content[starts[-1] :]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(pieces))
        action = rng.randrange(6)
        if action == 0:
            pieces.insert(at, rng.choice(_PICKLE_PIECES))
        elif action == 1 and len(pieces) > 2:
            del pieces[at]
        elif action == 2:
            pieces[at] = rng.choice(_PICKLE_PIECES)
        elif action == 3:
            other = rng.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif action == 4:
            pieces[at] = damage(pieces[at], rng)
        else:
            pieces[at:at] = pieces[at : at + rng.choice((1, 5, 20))] * rng.choice((1, 3, 200))
    return b"".join(pieces) + rest


def _protobuf(content: bytes, rng: random.Random, depth: int = 0) -> bytes:
    """Change one field at a random depth and put correct lengths around it."""
    fields = _fields(content)
    if not fields:
        return damage(content, rng)
    at = rng.randrange(len(fields))
    number, kind, payload = fields[at]
    action = rng.random()
    if kind == 2 and depth < 3 and action < 0.6:
        fields[at] = (number, kind, _protobuf(payload, rng, depth + 1))
    elif action < 0.7:
        fields[at] = (number, 0, rng.choice(_NUMBERS))
    elif action < 0.78:
        fields[at] = (rng.choice((0, 1, 2, 3, 4, 2**29 - 1)), kind, payload)
    elif action < 0.85:
        del fields[at]
    elif action < 0.93:
        fields[at:at] = [fields[at]] * rng.choice((1, 2, 40))
    else:
        fields[at] = (number, 2, rng.choice((b"", b"str", b"Float64", b"a\nb", b"\xff", b"\x00" * 64, b"x" * 70_000)))
    return b"".join(_encode(*field) for field in fields)


def _fields(content: bytes) -> list[tuple[int, int, Any]]:
    found, position = [], 0
    while position < len(content):
        key, position = _varint_at(content, position)
        if key is None or key & 7 not in (0, 2):
            return []
        value, position = _varint_at(content, position)
        if value is None or (key & 7 == 2 and position + value > len(content)):
            return []
        if key & 7 == 2:
            found.append((key >> 3, 2, content[position : position + value]))
            position += value
        else:
            found.append((key >> 3, 0, value))
    return found


def _varint_at(content: bytes, position: int) -> tuple[int | None, int]:
    value = 0
    for index in range(10):
        if position + index >= len(content):
            return None, position
        byte = content[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    return None, position


def _encode(number: int, kind: int, payload: Any) -> bytes:
    if kind == 0:
        return _varint(number << 3) + _varint(payload)
    payload = payload if isinstance(payload, bytes) else b""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _index_case(corpus: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    shards = {"model-1.safetensors": corpus["few.safetensors"], "model-2.bin": corpus["module.bin"]}
    weight_map = {name: "model-1.safetensors" for name in ("a.weight", "a.bias", "empty", "scalar")}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {**weight_map, "weight": "model-2.bin", "bias": "model-2.bin"},
    }
    if rng.random() < 0.3:
        shard = rng.choice(sorted(shards))
        shards[shard] = damage(shards[shard], rng)
    encoded = json.dumps(index).encode()
    for _ in range(rng.choice((0, 1, 2))):
        # a mutation may put a table into itself; JSON has no such thing
        index = _json(json.loads(encoded), rng)
        with contextlib.suppress(ValueError):
            encoded = json.dumps(index).encode()
    return {"model.index.json": damage(encoded, rng) if rng.random() < 0.2 else encoded, **shards}
