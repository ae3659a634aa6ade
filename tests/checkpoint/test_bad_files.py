"""Damaged and lying files are refused with one line that names the file; nothing is executed, memory stays bounded."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from tests.checkpoint.samples import WRITERS

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3, dtype=torch.bfloat16)}
FILES = (*WRITERS, "ms.ckpt")


def write_file(path):
    if path.suffix == ".ckpt":
        write_checkpoint(path, MemorySource({name: t.float().numpy() for name, t in TENSORS.items()}))
    else:
        WRITERS[path.name](path, TENSORS)


def read_all(path) -> set[str]:
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.infos:
            checkpoint.read(name)
        return set(checkpoint.infos)


def refused(path, message: str = ".") -> str:
    with pytest.raises(UserError, match=message) as caught:
        read_all(path)
    text = str(caught.value)
    assert "\n" not in text and path.name in text and ";" in text and len(text) < 1000
    return text


@pytest.mark.parametrize("file", FILES)
def test_truncated_anywhere(file, tmp_path):
    path = tmp_path / file
    write_file(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            names = read_all(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            # A .ckpt that ends between two tensors is a whole .ckpt with fewer tensors.
            assert file == "ms.ckpt" and names < set(TENSORS)


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=300)
@given(data=st.data())
def test_damaged_anywhere(file, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / file
    write_file(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_all(path)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("file", FILES)
@given(content=st.binary(max_size=300))
def test_noise(file, content, tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / file
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_all(path)


def safetensors(header, body: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete"),
        (struct.pack("<Q", 2**63) + b"{}", "not a complete"),
        (safetensors(b"[" * 100_000), "tables or lists, too many"),
        (safetensors(b"[" * 90 + b"1" * 5000), "not JSON"),
        (safetensors(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (safetensors([1]), "not a table"),
        (safetensors({"a": entry(dtype="F7")}, bytes(8)), "dtype 'F7'"),
        (safetensors({"a": entry(dtype=["F32"])}, bytes(8)), "dtype"),
        (safetensors({"a": entry(shape=[-2])}, bytes(8)), "shape"),
        (safetensors({"a": entry(shape=[True, 2])}, bytes(8)), "shape"),
        (safetensors({"a": entry(shape=[2**61, 8])}, bytes(8)), "impossible shape"),
        (safetensors({"a": entry(shape=[2**61, 0], offsets=[0, 0])}), "impossible shape"),
        (safetensors({"a": entry(shape=[1] * 33, offsets=[0, 4])}, bytes(4)), "impossible shape"),
        (safetensors({"a": entry(shape=[1] * 6000, offsets=[0, 4])}, bytes(4)), "impossible shape"),
        (safetensors({"a": entry(shape=[1.0, 2])}, bytes(8)), "shape"),
        (safetensors({"a": entry(offsets=[-8, 0])}, bytes(8)), "offsets"),
        (safetensors({"a": entry(offsets=[0, 2**64])}, bytes(8)), "offsets"),
        (safetensors({"a": entry(dtype="F7" * 50_000)}, bytes(8)), "dtype"),
        (safetensors({"a" * 5000: entry()}, bytes(8)), "overlong"),
        (safetensors({"": entry()}, bytes(8)), "empty"),
        (safetensors({"__metadata__": {"x": []}, "a": entry()}, bytes(8)), "metadata"),
        (safetensors({"a": [1, 2]}, bytes(8)), "dtype"),
        (safetensors({"a": entry(dtype="F8_E4M3", offsets=[0, 2])}, bytes(2)), "F8_E4M3"),
        (struct.pack("<Q", 2**27) + bytes(2**27), "more than"),
        (struct.pack("<Q", 100) + b"{}", "not a complete"),
        (safetensors({"a": entry(shape=[3])}, bytes(8)), "does not fit its bytes"),
        (safetensors({"a": entry(offsets=[8, 0])}, bytes(8)), "does not fit its bytes"),
        (safetensors({"a": entry(offsets=[0, 8])}, bytes(4)), "describes"),
        (safetensors({"a": entry(offsets=[0, 8])}, bytes(12)), "describes"),
        (safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (safetensors({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "gap"),
        (safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "twice"),
        (safetensors({"a\nb": entry()}, bytes(8)), "unprintable"),
        (safetensors({"a\ud800": entry()}, bytes(8)), "unprintable"),
        (safetensors({"__metadata__": {"format": "pt"}}), "no tensors"),
        (safetensors({"__metadata__": [1], "a": entry()}, bytes(8)), "metadata"),
    ],
)
def test_lying_safetensors(content, message, tmp_path):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content)
    refused(path, message)


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function", [touch, eval, exec, __import__, torch.load, np.load])
def test_a_pickle_with_a_call_executes_nothing(function, legacy, tmp_path):
    trace = tmp_path / "executed"
    argument = f"open({str(trace)!r}, 'w')" if function in (eval, exec) else str(trace)
    path = tmp_path / "bad.bin"
    torch.save({"a": torch.ones(2), "b": Call(function, argument)}, path, _use_new_zipfile_serialization=not legacy)
    assert "nothing was executed" in refused(path, function.__name__)
    assert not trace.exists()


def torch_zip(path, pickled: bytes, **storages: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for key, content in storages.items():
            archive.writestr(f"x/data/{key.removeprefix('s')}", content)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def one_tensor(first=b"K\x00", shape=b"K\x02\x85", strides=b"K\x01\x85", storage=STORAGE) -> bytes:
    call = REBUILD + b"(" + storage + first + shape + strides + b"\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."


def test_the_hand_written_pickle_is_read(tmp_path):
    torch_zip(tmp_path / "x.bin", one_tensor(), s0=np.float32([3, 4]).tobytes())
    with open_checkpoint(tmp_path / "x.bin") as checkpoint:
        assert checkpoint.read("a").data.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "os.system"),
        (b"\x80\x02(S'ls'\nios\nsystem\n.", "instruction"),
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lso.", "os.system"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "instruction"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something"),
        (b"\x80\x02}K\x01R.", "calls something"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged pickle"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "instruction"),
        (b"\x80\x04B\xff\xff\xff\xff.", "pickle"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "pickle"),
        (b"\x80\x02\x8b\xff\xff\xff\xff.", "pickle"),
        (b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.", "no tensors"),
        (b"\x80\x02" + b"N0" * 2_000_000 + b".", "instructions"),
        (one_tensor(first=b"K\x01"), "reaches beyond"),
        (one_tensor(first=b"J\xff\xff\xff\xff"), "impossible shape"),
        (one_tensor(strides=b"J\xff\xff\xff\xff\x85"), "impossible shape"),
        (one_tensor(strides=b"K\x02\x85"), "reaches beyond"),
        (one_tensor(shape=b"J\xff\xff\xff\x7f\x85", strides=b"K\x00\x85"), "contiguous"),
        (one_tensor(shape=b"K\x02K\x02\x86"), "impossible shape"),
        (one_tensor(storage=STORAGE.replace(b"K\x02tQ", b"K\x09tQ")), "missing or too short"),
        (one_tensor(storage=STORAGE.replace(b"FloatStorage", b"ComplexFloatStorage")), "ComplexFloatStorage"),
        (one_tensor(storage=b"K\x01Q"), "not a storage"),
        (b"\x80\x02cposix\nsystem\n.", "posix.system"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nX\x02\x00\x00\x00idb.", "no table"),
        (b"\x80\x02}\x82\x01.", "instruction"),
        (b"\x80\x02\x84\xff\xff\xff\x7f.", "instruction"),
        (b"\x80\x02(ios\nsystem\n.", "instruction"),
        (b"\x80\x02P0\n.", "instruction"),
        (b"\x80\x04]\x8f.", "no table"),
        (b"\x80\x05\x97.", "instruction"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff}.", "no tensors"),
        (b"c" + b"a" * 5000 + b"\nb\n.", "damaged"),
        (b"\x80\x02j\x00\x00\x00\x01.", "damaged"),
        (b"\x80\x02u.", "damaged"),
        (b"\x80\x02(((.", "damaged"),
        (b"\x80\x02]2a.", "no table"),
        (b"\x80\x02}\x8a\x09" + bytes(8) + b"\x01Ns.", "no tensors"),
        (b"\x80\x02}G\x00\x00\x00\x00\x00\x00\x00\x00Ns.", "no tensors"),
        (one_tensor(shape=b"(" + b"K\x01" * 40 + b"t", strides=b"(" + b"K\x01" * 40 + b"t"), "impossible shape"),
        (one_tensor(storage=STORAGE.replace(b"K\x02tQ", b"J\xff\xff\xff\xfftQ")), "unknown kind"),
        (one_tensor(storage=STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007")), "missing or too short"),
        (b"\x80\x02}.", "no tensors"),
        (b"\x80\x02K\x01.", "no table"),
    ],
)
def test_lying_pickles(pickled, message, tmp_path):
    torch_zip(tmp_path / "lie.bin", pickled, s0=bytes(8))
    refused(tmp_path / "lie.bin", message)


@settings(max_examples=500)
@given(body=st.lists(st.sampled_from([*(bytes([b]) for b in b"}])(NKJtqh\x85\x86\x87su.ae012bQR"), REBUILD, STORAGE])))
def test_random_pickles(body, tmp_path_factory):
    path = tmp_path_factory.mktemp("pickles") / "random.bin"
    torch_zip(path, b"\x80\x02" + b"".join(body) + b".", s0=bytes(8))
    with pytest.raises(UserError):
        read_all(path)


def test_zip_bomb_and_other_zips(tmp_path):
    path = tmp_path / "bomb.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10_000_000))
    refused(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "not one of PyTorch weights")
    torch_zip(path, b"\x80\x02" + b"N" * (17 * 1024 * 1024), s0=b"")
    refused(path, "more than")
