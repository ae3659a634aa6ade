"""The original libraries read our files, and a failed write leaves no trace."""

import errno
import os

import mindspore
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open

from mindvlm.checkpoint import (
    CastSource,
    MemorySource,
    RawTensor,
    TensorSource,
    mindspore_format,
    open_checkpoint,
    write_checkpoint,
)
from mindvlm.core.errors import UserError
from tests.checkpoint.samples import state_dicts, storage

ENDINGS = (".safetensors", ".ckpt", ".bin")


def memory(tensors) -> MemorySource:
    names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return MemorySource({name: RawTensor.from_array(storage(t), names[name]) for name, t in tensors.items()})


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=30)
@given(tensors=state_dicts)
def test_round_trip(ending, tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("write") / f"out{ending}"
    source = memory(tensors)
    written = []
    write_checkpoint(path, source, metadata={"note": "hällo"}, progress=lambda name, size: written.append(size))
    assert sum(written) == sum(info.num_bytes for info in source.infos.values())
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.infos) == source.infos
        # torch's format has no place for it
        assert checkpoint.metadata == ({} if ending == ".bin" else {"note": "hällo"})
        for name in source.infos:
            assert checkpoint.read(name).data.tobytes() == source.read(name).data.tobytes()


@settings(max_examples=30)
@given(tensors=state_dicts)
def test_torch_loads_the_bin(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("write") / "out.bin"
    write_checkpoint(path, memory(tensors))
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert loaded[name].is_contiguous() and not loaded[name].requires_grad
        assert storage(loaded[name]).tobytes() == storage(tensor).tobytes()


def test_the_same_tensors_make_the_same_bin(tmp_path):
    for name in ("a.bin", "b.bin"):
        write_checkpoint(tmp_path / name, MemorySource({"w": np.ones((2, 3), np.float32)}))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_mindspore_loads_the_ckpt(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_format, "_SLICE_BYTES", 64)
    arrays = {
        "layer.weight": np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32),
        "half": np.linspace(-1, 1, 100).astype(np.float16),
        "ids": np.arange(16, dtype=np.int64),
        "mask": np.array([True, False, True]),
        "scalar": np.array(1.5, np.float32),
    }
    bits = np.array([0x3F80, 0xC000, 0x3E80], np.uint16)
    path = tmp_path / "out.ckpt"
    write_checkpoint(path, MemorySource({**arrays, "brain": RawTensor.from_array(bits, "bfloat16")}))
    loaded = mindspore.load_checkpoint(str(path))
    assert list(loaded) == [*arrays, "brain"]
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape and np.array_equal(loaded[name].asnumpy(), array)
    assert loaded["brain"].dtype == mindspore.bfloat16
    assert loaded["brain"].astype(mindspore.float32).asnumpy().tolist() == [1.0, -2.0, 0.25]


def test_the_safetensors_library_reads_the_file(tmp_path):
    path = tmp_path / "out.safetensors"
    arrays = {"b": np.ones((3, 2), np.int8), "a": np.arange(5.0), "é": np.zeros((0, 4), np.float32)}
    write_checkpoint(path, MemorySource(arrays), metadata={"format": "ms"})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "ms"}
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            assert np.array_equal(file.get_tensor(name), array)


class Failing(TensorSource):
    """Fails with `error` at the second tensor."""

    def __init__(self, error: BaseException):
        self.inner = MemorySource({"a": np.ones(3), "b": np.ones(4)})
        self.path, self.infos, self.error = self.inner.path, self.inner.infos, error

    def read_range(self, name, start, stop):
        if name == "b":
            raise self.error
        return self.inner.read_range(name, start, stop)


@pytest.mark.parametrize("error", [UserError("damaged"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failure_leaves_the_old_file_and_nothing_else(ending, error, tmp_path):
    path = tmp_path / f"out{ending}"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_checkpoint(path, Failing(error))
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.onnx", "end the name with"),
        ("missing/out.ckpt", "does not exist"),
        ("folder.ckpt", "is a folder"),
        ("pipe.ckpt", "not a regular file"),
    ],
)
def test_targets_that_cannot_be_written(name, message, tmp_path):
    (tmp_path / "folder.ckpt").mkdir()
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(UserError, match=message) as caught:
        write_checkpoint(tmp_path / name, MemorySource({"a": np.ones(3)}))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mindvlm.checkpoint.atomic.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_checkpoint(tmp_path / "out.ckpt", MemorySource({"a": np.ones(3)}))
    assert os.listdir(tmp_path) == []


def test_cast_source_names_the_tensor_that_overflows():
    source = CastSource(MemorySource({"fine": np.ones(2, np.float32), "big": np.array([1e6], np.float32)}), "float16")
    assert source.read("fine").dtype == "float16"
    with pytest.raises(UserError, match="tensor big .*float16"):
        source.read("big")


def test_cast_source_leaves_integers():
    source = CastSource(MemorySource({"ids": np.arange(3), "w": np.ones(3, np.float32)}), "bfloat16")
    assert [info.dtype for info in source.infos.values()] == ["int64", "bfloat16"]
    assert source.read("w").to_float32().tolist() == [1, 1, 1]
