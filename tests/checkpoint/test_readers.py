"""Files that torch, safetensors and MindSpore wrote are read back bit for bit, whole and in parts."""

import mindspore
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore.train import serialization

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from tests.checkpoint.samples import DTYPES, WRITERS, random_tensor, state_dicts, storage


@pytest.mark.parametrize("file", WRITERS)
@settings(max_examples=30)
@given(tensors=state_dicts, cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_reads_what_the_library_wrote(file, tensors, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / file
    WRITERS[file](path, tensors)
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.infos) == set(tensors)
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert (DTYPES[read.dtype], read.shape) == (tensor.dtype, tuple(tensor.shape))
            assert np.array_equal(read.data.view(), storage(tensor), equal_nan=read.data.dtype.kind == "f")
            flat = storage(tensor).reshape(-1)
            start, stop = sorted(int(fraction * flat.size) for fraction in cut)
            assert checkpoint.read_range(name, start, stop).tobytes() == flat[start:stop].tobytes()
            assert b"".join(chunk.tobytes() for chunk in checkpoint.chunks(name, 24)) == flat.tobytes()


@pytest.mark.parametrize("writer", ["zip.bin", "legacy.pt"])
def test_views_and_shared_storages(writer, tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1:, ::2, 1],
        "tail": base.reshape(-1)[7:],
        "element": base[1, 2, 3],
        "expanded": base[0, 0, :1].expand(4, 1, 3),
        "parameter": torch.nn.Parameter(base.mT),
    }
    WRITERS[writer](tmp_path / writer, tensors)
    with open_checkpoint(tmp_path / writer) as checkpoint:
        for name, tensor in tensors.items():
            assert np.array_equal(checkpoint.read(name).data, storage(tensor)), name
            flat = storage(tensor).reshape(-1)
            for start in range(flat.size):
                assert np.array_equal(checkpoint.read_range(name, start, flat.size), flat[start:]), name
        assert sum(s.num_bytes for s in {s for t in checkpoint.tensors.values() for s in t.segments}) < 60 * 4 * 7


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_table_inside_a_training_checkpoint(key, tmp_path):
    torch.save({"epoch": 3, "lr": 1e-4, key: {"a": torch.ones(2)}}, tmp_path / "c.pth")
    assert list(open_checkpoint(tmp_path / "c.pth").infos) == ["a"]


def test_module_state_dict_with_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "m.bin")
    with open_checkpoint(tmp_path / "m.bin") as checkpoint:
        for name, tensor in module.state_dict().items():
            assert np.array_equal(checkpoint.read(name).data, storage(tensor))


MINDSPORE = {name: getattr(mindspore, name) for name in sorted(DTYPES) if name not in ("bfloat16", "bool")}


@pytest.mark.parametrize("crc_check", [False, True])
def test_mindspore_file(crc_check, tmp_path, monkeypatch):
    # Slices of one KiB, so that a small tensor is spread over several values as a large one would be.
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    arrays = {name: storage(random_tensor(name, (40, 30))) for name in MINDSPORE}
    entries = [{"name": name, "data": mindspore.Tensor(array)} for name, array in arrays.items()]
    halves = random_tensor("bfloat16", (50, 31))
    entries.append({"name": "bfloat16", "data": mindspore.Tensor(halves.float().numpy(), mindspore.bfloat16)})
    entries.append({"name": "scalar", "data": mindspore.Tensor(np.float32(2.5))})
    path = tmp_path / "ms.ckpt"
    mindspore.save_checkpoint(entries, str(path), append_dict={"note": "hello"}, crc_check=crc_check)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"note": "hello"}
        assert len(checkpoint.tensors["float32"].segments) > 1
        for name, array in arrays.items():
            assert checkpoint.infos[name].dtype == name
            assert np.array_equal(checkpoint.read(name).data, array)
            assert np.array_equal(checkpoint.read_range(name, 100, 1100), array.reshape(-1)[100:1100])
        assert np.array_equal(checkpoint.read("bfloat16").data, storage(halves))
        assert checkpoint.read("scalar").data.shape == () and checkpoint.read("scalar").data == 2.5


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "a GGUF file, quantized for llama.cpp"),
        ("model.bin", b"<!DOCTYPE html><html>", "an HTML page, such as a failed download leaves"),
        ("model.safetensors", b"<html>", "an HTML page"),
        ("lightning.ckpt", "model.bin", "a zip file, such as torch.save writes; rename it to lightning.pt"),
        ("model.safetensors", "model.bin", "rename it to model.pt"),
        ("model.bin", "model.safetensors", "a safetensors file; rename it to model.safetensors"),
        ("model", "model.safetensors", "a safetensors file; rename it to model.safetensors"),
    ],
)
def test_a_file_under_the_name_of_another_kind_is_named_as_what_it_is(name, content, expected, tmp_path):
    (tmp_path / "source").mkdir()
    if isinstance(content, str):
        write_checkpoint(tmp_path / "source" / content, MemorySource({"a": np.ones(2, np.float32)}))
        content = (tmp_path / "source" / content).read_bytes()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{expected}"):
        open_checkpoint(tmp_path / name)


def test_a_missing_file_and_an_unknown_ending(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_checkpoint(tmp_path / "nothing.bin")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.h5.*expected one of \.safetensors"):
        open_checkpoint(tmp_path / "weights.h5")
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        open_checkpoint(tmp_path / "pointer.bin")
