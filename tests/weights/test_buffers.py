"""Small tensors as text and back, and texts that lie."""

import base64
import json
import zlib

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource
from mindvlm.weights.buffers import MAX_CHARACTERS, pack_buffers, unpack_buffers


def test_small_tensors_survive():
    tensors = {"a": np.arange(12, dtype=np.int64).reshape(3, 4), "b": np.float32(0.5), "c": np.array([True, False])}
    found = unpack_buffers(pack_buffers(MemorySource(tensors), tensors))
    assert list(found) == ["a", "b", "c"]
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype.name and np.array_equal(found[name].data, array)


def test_what_is_too_long_stays_out():
    noise = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)
    text = pack_buffers(MemorySource({"mask": noise, "ids": np.arange(9)}), ["mask", "ids"])
    assert len(text) <= MAX_CHARACTERS and list(unpack_buffers(text)) == ["ids"]


BOMB = base64.b64encode(zlib.compress(bytes(100_000_000), 9)[:8000]).decode()


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[1]", "{", "[" * 5000, '{"a": 1}', '{"a": ["int8", [2], "x"]}', '{"a": ["int8", [-2], ""]}',
        '{"a": ["int8", [3], "eNpjAAAAAQAB"]}', '{"a": ["int128", [1], "eNpjAAAAAQAB"]}',
        json.dumps({"a": ["int8", [2**40], BOMB]}), json.dumps({"a": ["int8", [4], BOMB]}),
    ],
)  # fmt: skip
def test_a_damaged_text_holds_nothing(text):
    assert unpack_buffers(text) == {}
