"""Sharded writes: what goes where, loaders that read it, and several files that appear together or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mindvlm.checkpoint import (
    MemorySource,
    TensorSource,
    atomic,
    open_checkpoint,
    parse_size,
    plan_target,
    write_checkpoint,
)
from mindvlm.core.errors import UserError

ARRAYS = {name: np.full(100, index, np.float32) for index, name in enumerate("edcba")}
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


def content(path) -> dict[str, list]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).data.tolist() for name in checkpoint.infos}


def snapshot(folder) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_shards_with_the_index_of_hugging_face(tmp_path):
    written = []
    files = write_checkpoint(
        tmp_path / "out",
        MemorySource(ARRAYS),
        max_shard_size=900,
        metadata={"format": "pt"},
        progress=lambda name, size: written.append((name, size)),
    )
    assert [file.name for file in files] == [*SHARDS, INDEX] and files[0].parent == tmp_path / "out"
    assert sorted(written) == [(name, 400) for name in "abcde"]
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"] == {"a": SHARDS[2], "b": SHARDS[1], "c": SHARDS[1], "d": SHARDS[0], "e": SHARDS[0]}
    assert content(tmp_path / "out") == {name: array.tolist() for name, array in ARRAYS.items()}
    with safe_open(files[1], "np") as file:
        assert set(file.keys()) == {"c", "b"} and file.metadata() == {"format": "pt"}


def test_transformers_loads_the_shards(tmp_path):
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.OPTModel(config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    files = write_checkpoint(tmp_path, MemorySource(state), metadata={"format": "pt"}, max_shard_size=parse_size("2KB"))
    assert len(files) > 3
    loaded, report = transformers.OPTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20),
    limit=st.integers(1, 60),
)
def test_shards_hold_at_most_the_limit(sizes, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    source = MemorySource({f"t{index}": np.ones(size, np.uint8) for index, size in enumerate(sizes)})
    target = plan_target(folder / "x.safetensors", source.infos, max_shard_size=limit)
    assert [name for names in target.shards.values() for name in names] == list(source.infos)
    totals = [sum(source.infos[name].num_bytes for name in names) for names in target.shards.values()]
    for number, (names, total) in enumerate(zip(target.shards.values(), totals, strict=True)):
        assert total <= limit or len([name for name in names if source.infos[name].num_bytes]) == 1
        if number + 1 < len(totals):
            following = next(iter(list(target.shards.values())[number + 1]))
            assert total + source.infos[following].num_bytes > limit
    assert write_checkpoint(folder / "x.safetensors", source, max_shard_size=limit) == target.files
    assert set(os.listdir(folder)) == {file.name for file in target.files}


@pytest.mark.parametrize("path", ["w.safetensors", "w.ckpt", "", "new"])
def test_one_file_when_everything_fits(path, tmp_path):
    size = None if path.endswith("ckpt") else 10_000
    files = write_checkpoint(tmp_path / path, MemorySource(ARRAYS), max_shard_size=size)
    assert files == ((tmp_path / path) if "." in path else tmp_path / path / "model.safetensors",)
    assert set(content(tmp_path / path)) == set(ARRAYS)


def test_another_write_to_the_same_target_replaces_all_its_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"not listed by any index: not ours")
    for limit, count in [(900, 3), (400, 5), (None, 1), (400, 5), (900, 3), (10_000, 1)]:
        target = plan_target(tmp_path, MemorySource(ARRAYS).infos, max_shard_size=limit)
        before = set(tmp_path.iterdir())
        files = write_checkpoint(tmp_path, MemorySource(ARRAYS), max_shard_size=limit)
        assert len(files) == (count if count == 1 else count + 1)
        assert before - set(tmp_path.iterdir()) == set(target.obsolete)
        names = {"tokenizer.json", "model-00009-of-00009.safetensors", *(file.name for file in files)}
        assert set(os.listdir(tmp_path)) == names
        assert content(tmp_path) == {name: array.tolist() for name, array in ARRAYS.items()}


@pytest.mark.parametrize(
    "index", ["{", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "other.safetensors"}}']
)
def test_an_index_that_lists_what_is_not_ours_removes_nothing_else(index, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    (tmp_path / "out" / "other.safetensors").write_bytes(b"mine")
    (tmp_path / "out" / INDEX).write_text(index)
    write_checkpoint(tmp_path / "out", MemorySource(ARRAYS))
    assert (tmp_path / "x.safetensors").exists()
    assert set(os.listdir(tmp_path / "out")) == {"other.safetensors", "model.safetensors"}


class Failing(TensorSource):
    """Fails with `error` at tensor b."""

    def __init__(self, error: BaseException):
        self.inner = MemorySource(ARRAYS)
        self.path, self.infos, self.error = self.inner.path, self.inner.infos, error

    def read_range(self, name, start, stop):
        if name == "b":
            raise self.error
        return self.inner.read_range(name, start, stop)


@pytest.mark.parametrize("error", [UserError("damaged"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("earlier", [None, 400, 10_000])
def test_a_failure_in_a_late_shard_changes_nothing(error, earlier, tmp_path):
    if earlier:
        write_checkpoint(tmp_path / "out", MemorySource({"old": np.ones(1000)}), max_shard_size=earlier)
    before = snapshot(tmp_path / "out") if earlier else None
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "out", Failing(error), max_shard_size=400)
    assert (snapshot(tmp_path / "out") if earlier else os.listdir(tmp_path)) == (before or [])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("earlier", [None, 900, 400, 10_000])
@pytest.mark.parametrize("after", [False, True])
def test_a_failure_between_two_renames_brings_the_earlier_files_back(after, earlier, error, tmp_path, monkeypatch):
    if earlier:
        write_checkpoint(tmp_path, MemorySource({**ARRAYS, "e": np.ones(100, np.float32)}), max_shard_size=earlier)
    before, replace = snapshot(tmp_path), os.replace
    for failing_call in range(1, 12):
        calls = 0

        def interrupted(source, target, failing_call=failing_call):
            nonlocal calls
            calls += 1
            if calls == failing_call and not after:
                raise error
            replace(source, target)
            if calls == failing_call:
                raise error

        monkeypatch.setattr(atomic.os, "replace", interrupted)
        try:
            write_checkpoint(tmp_path, MemorySource(ARRAYS), max_shard_size=900)
        except (KeyboardInterrupt, UserError):
            assert snapshot(tmp_path) == before
        else:
            break
    assert failing_call > 4 and content(tmp_path) == {name: array.tolist() for name, array in ARRAYS.items()}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_a_killed_process_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        ours = [
            ".model-00002-of-00007.safetensors.{}.partial",
            f".{INDEX}.{{}}.earlier",
            ".model.safetensors.{}.partial",
        ]
        for name in ours:
            for process in (ended, running):
                (tmp_path / name.format(process.pid)).write_bytes(b"x")
        other = tmp_path / f".other.safetensors.{ended.pid}.partial"
        other.write_bytes(b"x")
        write_checkpoint(tmp_path, MemorySource(ARRAYS))
        kept = {other.name, *(name.format(running.pid) for name in ours)}
        assert set(os.listdir(tmp_path)) == {"model.safetensors", *kept}
        write_checkpoint(tmp_path / "other.safetensors", MemorySource(ARRAYS))
        assert not other.exists()
    finally:
        running.kill()
        running.wait()


def test_a_killed_write_leaves_nothing_under_the_name(tmp_path):
    script = f"""
import numpy as np, os, signal
from mindvlm.checkpoint import MemorySource, write_checkpoint
def progress(name, size):
    if name == "t5": os.kill(os.getpid(), signal.SIGKILL)
source = MemorySource({{f"t{{i}}": np.ones(10) for i in range(9)}})
write_checkpoint({str(tmp_path)!r}, source, max_shard_size=160, progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) and all(name.startswith(".") for name in os.listdir(tmp_path))
    write_checkpoint(tmp_path, MemorySource(ARRAYS))
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1GiB", 2**30), ("1.5 gib", 3 * 2**29), ("77", 77), (" 3kb ", 3000),
     (12, 12), ("0.5KB", 500), ("1TB", 10**12), ("9007199254740993", 9007199254740993), ("8B", 8)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0.1", "1e9", "2 XB", "1,5GB", "inf", "2GB\n3", "１GB", "1_0", None]
)
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not a size; expected") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        ("x.ckpt", 400, "always one file"),
        ("x.safetensors", 0, "at least 1 byte"),
        ("x.onnx", None, "or give a folder"),
        ("missing/out", None, "the folder .*missing does not exist"),
        ("file/out", None, "the folder .*file does not exist"),
        ("taken", None, "is a file; end the name with"),
    ],
)
def test_targets_that_cannot_be(path, size, message, tmp_path):
    for name in ("file", "taken"):
        (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(UserError, match=message) as caught:
        write_checkpoint(tmp_path / path, MemorySource(ARRAYS), max_shard_size=size)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == {"file": b"mine", "taken": b"mine"}
