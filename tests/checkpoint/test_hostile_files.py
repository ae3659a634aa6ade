"""Files built to mislead: zip directories, legacy files, protobufs and indexes that lie."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from tests.checkpoint.protobuf_pieces import field, value, varint
from tests.checkpoint.samples import write_legacy
from tests.checkpoint.test_bad_files import one_tensor, refused, torch_zip

VALUES = np.float32([3, 4]).tobytes()


def good_zip(path) -> bytes:
    torch_zip(path, one_tensor(), s0=VALUES)
    return path.read_bytes()


def test_the_sample_is_read(tmp_path):
    good_zip(tmp_path / "x.bin")
    with open_checkpoint(tmp_path / "x.bin") as checkpoint:
        assert checkpoint.read("a").data.tolist() == [3, 4]


def at_end(content: bytes, offset: int, packed: bytes) -> bytes:
    """Write into the record at the end of a zip file."""
    at = content.rindex(b"PK\x05\x06") + offset
    return content[:at] + packed + content[at + len(packed) :]


def in_directory(content: bytes, entry: int, offset: int, packed: bytes) -> bytes:
    at = [index for index in range(len(content)) if content[index : index + 4] == b"PK\x01\x02"][entry] + offset
    return content[:at] + packed + content[at + len(packed) :]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda c: at_end(c, 16, struct.pack("<I", 0)), "not where it should be"),
        (lambda c: at_end(c, 16, struct.pack("<I", 2**32 - 1)), "not where it should be"),
        (lambda c: at_end(c, 12, struct.pack("<I", 2**31)), "not where it should be"),
        (lambda c: at_end(c, 10, struct.pack("<H", 1)), "is broken"),
        (lambda c: at_end(c, 10, struct.pack("<H", 9)), "is broken"),
        (lambda c: at_end(c, 20, struct.pack("<H", 9)), "not a complete"),
        (lambda c: b"#!/bin/sh\n" + c, "not a PyTorch file"),
        (lambda c: b"PK" + c, "not where it should be"),
        (lambda c: c + b"tail", "not a complete"),
        (lambda c: c.replace(b"x/data/0", b"y/data/0", 1), "another name"),
        (lambda c: in_directory(c, 0, 8, struct.pack("<H", 1)), "compressed"),
        (lambda c: in_directory(c, 1, 10, struct.pack("<H", 8)), "compressed"),
        (lambda c: in_directory(c, 1, 20, struct.pack("<I", 4)), "two sizes"),
        (lambda c: in_directory(c, 1, 20, struct.pack("<II", 10**6, 10**6)), "beyond the end"),
        (lambda c: in_directory(c, 1, 20, struct.pack("<II", 2**32 - 1, 2**32 - 1)), "no size or place"),
        (lambda c: in_directory(c, 1, 42, struct.pack("<I", 0)), "another name"),
        (lambda c: in_directory(c, 1, 42, struct.pack("<I", 2**32 - 2)), "not where it should be"),
        (lambda c: in_directory(c, 0, 28, struct.pack("<H", 65535)), "another name"),
        (lambda c: in_directory(c, 0, 32, struct.pack("<H", 65535)), "is broken"),
    ],
)
def test_lying_zip_directories(lie, message, tmp_path):
    path = tmp_path / "lie.bin"
    path.write_bytes(lie(good_zip(path)))
    refused(path, message)


def with_zip64(content: bytes, **fields) -> bytes:
    """Add the zip64 records, truthful but for `fields`."""
    at = content.rindex(b"PK\x05\x06")
    count, length, begin = struct.unpack("<HII", content[at + 10 : at + 20])
    truth = {"count": count, "length": length, "begin": begin, "position": at, **fields}
    record = b"PK\x06\x06" + struct.pack("<QHHIIQ", 44, 45, 45, 0, 0, truth["count"])
    record += struct.pack("<QQQ", truth["count"], truth["length"], truth["begin"])
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, truth["position"], 1)
    return content[:at] + record + locator + content[at:]


def test_zip64_records(tmp_path):
    path = tmp_path / "x.bin"
    content = good_zip(path)
    path.write_bytes(with_zip64(content))
    assert list(open_checkpoint(path).infos) == ["a"]
    for lie in ({"count": 2**63}, {"length": 2**64 - 1}, {"begin": 2**64 - 1}, {"begin": 0}, {"position": 2**64 - 1},
                {"position": 0}, {"count": 1}):  # fmt: skip
        path.write_bytes(with_zip64(content, **lie))
        refused(path, "directory of entries")


def test_entries_twice_or_on_top_of_each_other(tmp_path):
    path = tmp_path / "lie.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", one_tensor())
        archive.writestr("x/data/0", VALUES)
        with pytest.warns(UserWarning):
            archive.writestr("x/data/0", bytes(8))
    refused(path, "twice")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", one_tensor())
        archive.writestr("y/data.pkl", one_tensor())
    refused(path, "not one of PyTorch weights")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../data.pkl", one_tensor())
        archive.writestr("../data/0", VALUES)
    assert list(open_checkpoint(path).infos) == ["a"] and os.listdir(tmp_path) == ["lie.bin"]


def test_lying_legacy_files(tmp_path):
    path = tmp_path / "lie.pt"
    write_legacy(path, {"a": torch.ones(2), "b": torch.zeros(3)})
    content = path.read_bytes()
    keys_at = content.rindex(b"\x80\x02]")
    end = content.index(b".", content.index(b"e.", keys_at)) + 1
    sizes = content[end:]
    keys = pickle.loads(content[keys_at:end])

    def with_keys(listed, rest=sizes):
        path.write_bytes(content[:keys_at] + pickle.dumps(listed, 2) + rest)
        return path

    assert set(open_checkpoint(with_keys(keys)).infos) == {"a", "b"}
    refused(with_keys([*keys, keys[0]]), "does not match")
    refused(with_keys(keys[:1]), "does not match")
    refused(with_keys([keys[0], 3]), "does not match")
    refused(with_keys(keys[0]), "does not match")
    for lie in (-1, 2**62, 2**63 - 1, 1):
        refused(with_keys(keys, struct.pack("<q", lie) + sizes[8:]), "not complete")
    refused(with_keys(keys, sizes[:-1]), "not complete")
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps([], 2))
    refused(path, "big-endian")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends too early"),
        (b"\xff" * 11, "broken number"),
        (b"\x0a" + b"\xff" * 10 + b"\x01", "broken number"),
        (value(b"a", dims=b"\x08" + varint(2**64 - 2)), "impossible shape"),
        (value(b"a", dims=b"\x08" + varint(2**61) + b"\x08\x00", content=b""), "impossible shape"),
        (value(b"a", dims=(b"\x08" + varint(2**61)) * 4), "impossible shape"),
        (value(b"a", dims=b"\x08\x01" * 33), "impossible shape"),
        (value(b"a", dims=b"\x08\x05"), "needs 20 bytes but has 8"),
        (value(b"a", code=b"Float99"), "Float99"),
        (value(b"a", code=b"F" * 60_000), "F{80}'..."),
        (value(b"a", code=b"F" * 70_000), "a name of 70000 bytes"),
        (value(b"a", code=b"\xff"), "not text"),
        (value(b"a" * 600), "overlong"),
        (value(b""), "empty"),
        (value(b"a\n"), "unprintable"),
        (value(b"a", extra=field(3, b"")), "MapTensor"),
        (value(b"a") + value(b"b") + value(b"a"), "'a' twice"),
        (value(b"a") + value(b"a", dims=b"\x08\x01", content=bytes(4)), "'a' twice"),
        (value(b"a") + value(b"a"), "needs 8 bytes but has 16"),
        (value(b"a") + field(2, b""), "unknown entry"),
        (value(b"a") + b"\x0b", "ends too early"),
        (field(1, field(1, b"a")), "without a name or values"),
        (field(1, field(1, b"a") + field(2, field(2, b"Float32"))), "without a type or values"),
        (value(b"a", code=b"str", content=bytes([255] * 8)), "broken text"),
        (value(b"a", code=b"str", content=bytes(70_000)), "overlong text"),
        (b"", "no tensors"),
    ],
)
def test_lying_protobufs(content, message, tmp_path):
    (tmp_path / "lie.ckpt").write_bytes(content)
    refused(tmp_path / "lie.ckpt", message)


def test_the_hand_written_protobuf_is_read(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(value(b"a"))
    assert open_checkpoint(tmp_path / "x.ckpt").read("a").data.tolist() == [3, 4]


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.ckpt", "x.pt", "x.safetensors.index.json"])
def test_what_is_no_regular_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"")
    refused(path)
    path.unlink()
    os.mkfifo(path)
    refused(path, "not a regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(path, "not a regular file")
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError):
        open_checkpoint(path)
    path.unlink()
    path.mkdir()
    refused(path, "holds no weights")


def write_index(folder, weight_map, **shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    )
    return folder / "model.safetensors.index.json"


def test_lying_indexes(tmp_path):
    one = {"s1": {"a": torch.ones(2)}, "s2": {"a": torch.zeros(2), "b": torch.ones(1)}}
    refused(write_index(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}, **one), "does not list tensor 'a'")
    refused(write_index(tmp_path, {"b": "s1.safetensors"}), "says that tensor 'b'")
    refused(write_index(tmp_path, {"a": "model.safetensors.index.json"}), "expected one of")
    refused(write_index(tmp_path, '{"weight_map":{"a":"s1.safetensors","a":"s2.safetensors"}}'), "'a' twice")
    refused(write_index(tmp_path, {"a": "x" * 9000 + ".bin"}), "cannot be read|not in the folder")
    refused(write_index(tmp_path, {"a\n" * 5000: "../x.bin"}), "same folder")
    refused(write_index(tmp_path, {"a": ["s1.safetensors"]}), "same folder")
    refused(write_index(tmp_path, '{"weight_map": ' + "[" * 5000), "too many|not JSON")
    (tmp_path / "s3.safetensors").mkdir()
    refused(write_index(tmp_path, {"a": "s3.safetensors"}), "not in the folder")
    (tmp_path / "s4.safetensors").symlink_to("/dev/zero")
    refused(write_index(tmp_path, {"a": "s4.safetensors"}), "not in the folder")


def test_a_wrong_checkpoint_is_not_confused_with_a_right_one(tmp_path):
    """The endings decide the format: one under another's ending is refused."""
    write_checkpoint(tmp_path / "x.safetensors", MemorySource({"a": np.ones(2, np.float32)}))
    content = (tmp_path / "x.safetensors").read_bytes()
    for ending in (".bin", ".ckpt", ".pt"):
        (tmp_path / f"y{ending}").write_bytes(content)
        refused(tmp_path / f"y{ending}")
