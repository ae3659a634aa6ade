"""Every dtype through every format, shared and strided storages, tied weights, and memory while large ones are read."""

import collections
import subprocess
import sys

import mindspore
import numpy as np
import pytest
import torch

from mindvlm.checkpoint import MemorySource, RawTensor, open_checkpoint, strided, write_checkpoint
from mindvlm.core.errors import UserError
from tests.checkpoint.samples import DTYPES, WRITERS, random_tensor, storage

SHAPES = {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "one": (1,)}


def assert_holds(path, tensors):
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.infos) == set(tensors)
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert (DTYPES[read.dtype], read.shape) == (tensor.dtype, tuple(tensor.shape)), name
            assert read.data.tobytes() == storage(tensor).tobytes(), name


@pytest.mark.parametrize("target", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("file", WRITERS)
def test_every_dtype_from_every_format_to_every_format(file, target, tmp_path):
    tensors = {f"{dtype}.{kind}": random_tensor(dtype, shape) for dtype in DTYPES for kind, shape in SHAPES.items()}
    WRITERS[file](tmp_path / file, tensors)
    assert_holds(tmp_path / file, tensors)
    with open_checkpoint(tmp_path / file) as source:
        write_checkpoint(tmp_path / f"out{target}", source)
    assert_holds(tmp_path / f"out{target}", tensors)


def test_mindspore_loads_every_dtype(tmp_path):
    tensors = {f"{dtype}.{kind}": random_tensor(dtype, shape) for dtype in DTYPES for kind, shape in SHAPES.items()}
    names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    arrays = {name: RawTensor.from_array(storage(tensor), names[name]) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "x.ckpt", MemorySource(arrays), metadata={"note": "text", "blank": ""})
    loaded = mindspore.load_checkpoint(str(tmp_path / "x.ckpt"))
    for name, tensor in tensors.items():
        parameter = loaded[name]
        assert str(parameter.dtype).lower() == names[name] and parameter.shape == tuple(tensor.shape)
        if names[name] == "bfloat16":
            assert np.array_equal(parameter.astype(mindspore.float32).asnumpy(), tensor.float().numpy())
        else:
            assert np.array_equal(parameter.asnumpy(), tensor.numpy())


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tied_weights_parameters_and_wrappers(protocol, legacy, tmp_path):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    module = Tied()
    state = module.state_dict()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    marked = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    marked.note = "kept beside the values"
    for name, saved, expected in [
        ("state", state, state),
        ("parameters", parameters, parameters),
        ("attribute", {"a": marked}, {"a": marked.data}),
        ("wrapped", {"state_dict": state, "epoch": 1, "optimizer": {"state": {0: {"exp": torch.ones(2)}}}}, state),
        ("tensor beside", {"model": state, "loss": torch.tensor(1.0), "args": [None, True, 1.5, "y"]}, state),
        ("ordered", collections.OrderedDict(module=collections.OrderedDict(state)), state),
    ]:
        torch.save(saved, tmp_path / f"{name}.pt", **options)
        assert_holds(tmp_path / f"{name}.pt", expected)
    with open_checkpoint(tmp_path / "state.pt") as checkpoint:
        assert checkpoint.tensors["embed.weight"].segments == checkpoint.tensors["head.weight"].segments


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
@pytest.mark.parametrize("legacy", [False, True])
def test_untyped_storages_shared_and_strided(dtype, legacy, tmp_path):
    base = random_tensor(dtype, (6, 4))
    views = {"base": base, "transposed": base.T, "rows": base[2:], "columns": base[:, 1::2]}
    torch.save(views, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        for name, tensor in views.items():
            assert np.array_equal(checkpoint.read(name).data, tensor.contiguous().numpy()), name


def test_a_negated_view_is_refused(tmp_path):
    torch.save({"a": torch._neg_view(torch.ones(3))}, tmp_path / "in.pt")
    with pytest.raises(UserError, match="negated"):
        open_checkpoint(tmp_path / "in.pt")


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2).to(torch.float8_e4m3fn),
                                    torch.eye(2).to_sparse()])  # fmt: skip
def test_what_has_no_dtype_here_is_refused_by_name(tensor, tmp_path):
    torch.save({"a": torch.ones(2), "b": tensor}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="(?i)complex|float8|sparse"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("seed", range(40))
def test_strided_ranges_with_small_tiles(seed, tmp_path, monkeypatch):
    generator = np.random.default_rng(seed)
    monkeypatch.setattr(strided, "_TILE_BYTES", int(generator.integers(8, 200)))
    monkeypatch.setattr(strided, "_BLOCK_BYTES", int(generator.integers(8, 400)))
    shape = generator.integers(1, 7, generator.integers(1, 5)).tolist()
    base = torch.arange(int(np.prod(shape)) * 2, dtype=torch.int32).reshape(2, *shape)[1]
    view = base.permute(*generator.permutation(len(shape)).tolist())
    view = view[
        tuple(slice(int(generator.integers(0, size)), None, int(generator.integers(1, 3))) for size in view.shape)
    ]
    view = view.unsqueeze(int(generator.integers(0, view.dim() + 1)))
    if seed % 3 == 0:
        view = view.unsqueeze(0).expand(3, *view.shape)
    torch.save({"base": base, "view": view}, tmp_path / "x.pt")
    flat = view.reshape(-1).numpy()
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert np.concatenate(list(checkpoint.chunks("view", 12))).tolist() == flat.tolist()
        for _ in range(60):
            start, stop = sorted(generator.integers(0, flat.size + 1, 2).tolist())
            assert checkpoint.read_range("view", start, stop).tolist() == flat[start:stop].tolist()


PEAK = """
import sys
from mindvlm.checkpoint import open_checkpoint, write_checkpoint
def peak():
    # Not ru_maxrss, which a child process inherits.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
with open_checkpoint(sys.argv[1]) as source:
    write_checkpoint(sys.argv[2], source)
print(peak() - before)
"""


def megabytes_to_copy(source, target) -> int:
    result = subprocess.run([sys.executable, "-c", PEAK, source, target], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.parametrize(
    "side", [pytest.param(8700, id="300MB"), pytest.param(17320, id="1.2GB", marks=pytest.mark.slow)]
)
def test_memory_for_a_transposed_tensor(side, tmp_path):
    base = torch.arange(side * side, dtype=torch.int32).view(torch.float32).reshape(side, side)
    torch.save({"transposed": base.T}, tmp_path / "x.bin")
    assert megabytes_to_copy(tmp_path / "x.bin", tmp_path / "x.safetensors") < 250
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        for row in (0, side // 2, side - 1):
            read = checkpoint.read_range("transposed", row * side, (row + 1) * side).view(np.int32)
            assert np.array_equal(read, base[:, row].view(torch.int32).numpy())


@pytest.mark.slow
def test_a_ckpt_beyond_two_gigabytes(tmp_path):
    """One tensor above 2 GiB, streamed in and out, and loaded by MindSpore."""
    size = 2**31 + 2**24
    array = np.arange(size // 4, dtype=np.uint32).view(np.float32)
    small = np.arange(6, dtype=np.float16)
    source = MemorySource({"before": small, "large": array.reshape(-1, 2**10), "after": small})
    write_checkpoint(tmp_path / "x.ckpt", source)
    assert (tmp_path / "x.ckpt").stat().st_size > size
    assert megabytes_to_copy(tmp_path / "x.ckpt", tmp_path / "y.ckpt") < 100
    assert (tmp_path / "y.ckpt").read_bytes()[-200:] == (tmp_path / "x.ckpt").read_bytes()[-200:]
    (tmp_path / "x.ckpt").unlink()
    with open_checkpoint(tmp_path / "y.ckpt") as checkpoint:
        assert len(checkpoint.tensors["large"].segments) == 5
        position = 0
        for chunk in checkpoint.chunks("large", 2**26):
            assert np.array_equal(chunk.view(np.uint32), array[position : position + chunk.size].view(np.uint32))
            position += chunk.size
        assert position == array.size
    loaded = mindspore.load_checkpoint(str(tmp_path / "y.ckpt"))
    assert loaded["large"].shape == (array.size // 2**10, 2**10)
    assert np.array_equal(loaded["large"].asnumpy().reshape(-1).view(np.uint32), array.view(np.uint32))
    assert loaded["before"].asnumpy().tolist() == loaded["after"].asnumpy().tolist() == small.tolist()
