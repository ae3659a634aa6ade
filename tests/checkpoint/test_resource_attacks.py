"""Small or sparse files that would take much memory or time if they were believed."""

import pickle
import struct
import subprocess
import sys

import pytest

from tests.checkpoint.protobuf_pieces import field, value
from tests.checkpoint.test_bad_files import safetensors

MEASURE = """
import sys, time
from mindvlm.checkpoint import open_checkpoint
from mindvlm.core.errors import UserError
def peak():
    # Not ru_maxrss, which a child process inherits.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before, began = peak(), time.process_time()
try:
    print(len(open_checkpoint(sys.argv[1]).infos))
except UserError as error:
    print(error)
print(peak() - before, time.process_time() - began)
"""


def pickle_bomb(name: str) -> bytes:
    head = b"\x80\x02"
    return {
        # Each call copies a long list into a new table that stays on the stack.
        "tables from one list": head + b"ccollections\nOrderedDict\nq\x00](" + b"X\x02\x00\x00\x00abN\x86" * 50_000
        + b"e\x85q\x01" + b"h\x00h\x01R" * 100_000 + b".",
        # Numbers with one hash value.
        "colliding keys": head + b"}(" + b"".join(
            b"\x8a\x0b" + ((2**61 - 1) * k).to_bytes(11, "little") + b"N" for k in range(1, 200_000)) + b"u.",
        "memo": head + b"]\x94" * 2_100_000 + b".",
        "tables": head + b"}K\x00Ns" * 2_100_000 + b".",
        "nested tuples": head + b")" + b"\x85" * 2_100_000 + b".",
        "marks": head + b"(" * 2_100_000 + b"t.",
        "references": head + b"]q\x00" + b"h\x00h\x00\x86q\x00" * 2_100_000 + b".",
        "objects": head + b"cvanished\nA\nq\x00" + b"h\x00)\x81" * 700_000 + b".",
        "tables of objects": head + b"cvanished\nA\nq\x00" + b"h\x00)\x81K\x00Ns" * 400_000 + b".",
        "objects in objects": head + b"cvanished\nA\nq\x00" + b"h\x00(" * 500_000 + b"t\x81" * 500_000 + b".",
        "sets": head + b"\x8f" * 2_100_000 + b".",
        "long number": head + b"\x8b" + struct.pack("<I", 15_000_000) + b"\x7f" * 15_000_000 + b".",
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["lists in a header", "tables in a header", "texts in a header", "tensors in a header", "an index", "zip directory",
     "protobuf fields", "protobuf values", "protobuf texts", "protobuf slices", "tables from one list",
     "colliding keys", "memo", "tables", "nested tuples", "marks", "references", "long number",
     "objects", "tables of objects", "objects in objects", "sets"],
)  # fmt: skip
def test_attacks_on_memory_and_time(kind, tmp_path):
    if "header" in kind:
        path = tmp_path / "x.safetensors"
        piece = {"li": b"[],", "ta": b'{"a":0},', "te": b'"ab","cd",'}.get(kind[:2], b"")
        header = b'{"a":[' + piece * (12_100_000 // max(1, len(piece))) + b"0]}"
        if kind.startswith("tensors"):
            entry = b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
            header = b"{" + b"".join(entry % number for number in range(215_000))[:-1] + b"}"
        path.write_bytes(safetensors(header))
    elif kind == "an index":
        path = tmp_path / "x.safetensors.index.json"
        path.write_bytes(b'{"weight_map":{' + b"".join(b'"%x":"s.bin",' % n for n in range(700_000))[:-1] + b"}}")
    elif kind.startswith("protobuf"):
        path = tmp_path / "x.ckpt"
        empty = value(b"0000000", dims=b"\x08\x00", content=b"")
        texts = value(b"0000000", code=b"str", content=b"a\0\0\0" * 15_000)
        path.write_bytes({
            "fields": lambda: field(1, b"\x20\x00" * 30_000_000),
            "values": lambda: b"".join(empty.replace(b"0000000", b"%07d" % n) for n in range(200_000)),
            "texts": lambda: b"".join(texts.replace(b"0000000", b"%07d" % n, 1) for n in range(1500)),
            "slices": lambda: empty * 500_000,
        }[kind.split()[1]]())  # fmt: skip
    elif kind == "zip directory":
        path = tmp_path / "x.bin"
        with open(path, "wb") as file:
            file.write(b"PK\x03\x04")
            file.truncate(2**31)
            file.seek(2**31)
            file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**31 - 4, 4, 0))
    else:
        path = tmp_path / "x.pt"
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
                         + pickle.dumps({"little_endian": True}, 2) + pickle_bomb(kind))  # fmt: skip
    result = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=100)
    *message, figures = result.stdout.splitlines()
    assert len(message) == 1 and path.name in message[0], result.stderr[-500:]
    grown, seconds = map(float, figures.split())
    assert grown < 400 * 2**20 and seconds < 30, (grown, seconds)
