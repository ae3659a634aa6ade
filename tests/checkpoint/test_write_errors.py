"""A full disk, a size limit, a source that breaks off: one line that names the tensor, and nothing left behind."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from tests.checkpoint.samples import WRITERS

MEGABYTE = np.ones(2**18, np.float32)
SOURCE = MemorySource({name: MEGABYTE for name in ("first", "second", "third")})
TARGETS = [("x.safetensors", None), ("x.ckpt", None), ("x.safetensors", 2**20)]


@contextmanager
def file_size_limit(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_a_file_that_becomes_too_large(name, tmp_path):
    (tmp_path / name).write_bytes(b"old")
    with file_size_limit(2**20 + 2**19), pytest.raises(UserError) as caught:
        write_checkpoint(tmp_path / name, SOURCE)
    assert str(caught.value) == (
        f"{tmp_path / name}: cannot be written at tensor second (File too large); nothing was kept"
    )
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"old"


@pytest.mark.parametrize(("name", "limit"), TARGETS)
def test_a_full_disk(name, limit, tmp_path):
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2560k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        (folder / "other").write_bytes(b"other")
        with pytest.raises(UserError, match="at tensor third .No space left on device.; nothing was kept$") as caught:
            write_checkpoint(folder / name, SOURCE, max_shard_size=limit)
        assert "\n" not in str(caught.value)
        assert os.listdir(folder) == ["other"]
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("file", [*WRITERS, "x.ckpt"])
@pytest.mark.parametrize("limit", [None, 2**20])
def test_a_source_that_becomes_shorter_while_it_is_read(file, limit, tmp_path):
    source_path, folder = tmp_path / file, tmp_path / "out"
    tensors = {name: torch.from_numpy(MEGABYTE.reshape(512, 512)) + index for index, name in enumerate("abc")}
    if file == "x.ckpt":
        write_checkpoint(source_path, MemorySource({name: tensor.numpy() for name, tensor in tensors.items()}))
    else:
        tensors["c"] = tensors["c"].T
        WRITERS[file](source_path, tensors)

    with open_checkpoint(source_path) as source, pytest.raises(UserError) as caught:
        last = max(source.tensors.values(), key=lambda tensor: tensor.segments[0].offset)
        os.truncate(source_path, last.segments[-1].offset + 2**19)
        write_checkpoint(folder, source, max_shard_size=limit)
    assert str(caught.value) == (
        f"{source_path}: became shorter while it was read, at tensor {last.info.name}; copy or download it again"
    )
    assert not folder.exists()


def test_a_source_that_cannot_be_read(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "x.safetensors", SOURCE)
    with open_checkpoint(tmp_path / "x.safetensors") as source:

        def broken(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(UserError, match=r"x\.safetensors: cannot be read at tensor first .Input/output error.;"):
            write_checkpoint(tmp_path / "y.ckpt", source)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_an_interrupt_ends_the_process_without_a_trace(tmp_path):
    script = f"""
import numpy as np, os, signal
from mindvlm.checkpoint import MemorySource, write_checkpoint
source = MemorySource({{f"t{{i}}": np.ones(10) for i in range(9)}})
def progress(name, size):
    if name == "t5": os.kill(os.getpid(), signal.SIGINT)
write_checkpoint({str(tmp_path)!r}, source, max_shard_size=160, progress=progress)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert b"KeyboardInterrupt" in result.stderr and os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_disk_that_fails_in_the_background(failing_call, tmp_path, monkeypatch):
    """The kernel reports such a failure once, to whoever asked first."""
    monkeypatch.setattr("mindvlm.checkpoint.tensor_file._FLUSH_BYTES", 2**18)
    fsync, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == failing_call:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="cannot be written at tensor .*Input/output error"):
        write_checkpoint(tmp_path / "x.safetensors", SOURCE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "__metadata__", "a\nb"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "bin"])
def test_names_that_no_file_can_hold(name, ending, tmp_path):
    with pytest.raises(UserError, match="a tensor cannot be stored under the name .*; rename it in the source"):
        write_checkpoint(tmp_path / f"x.{ending}", MemorySource({name: MEGABYTE}))
    assert not os.listdir(tmp_path)
