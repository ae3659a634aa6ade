"""Hand-written messages of the `.ckpt` format, true or not."""

import numpy as np

VALUES = np.float32([3, 4]).tobytes()


def varint(value: int) -> bytes:
    return bytes([*(value >> shift & 0x7F | 0x80 for shift in range(0, 63, 7)), value >> 63])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def value(tag: bytes, dims: bytes = b"\x08\x02", code: bytes = b"Float32", content: bytes = VALUES, extra=b"") -> bytes:
    return field(1, field(1, tag) + field(2, dims + field(2, code) + field(3, content)) + extra)
