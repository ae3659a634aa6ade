"""Repeated loading: when the kept weights are used, when they are converted again, and which failures are tolerated."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mindvlm
from mindvlm.checkpoint import CastSource, MemorySource, open_checkpoint, write_checkpoint
from mindvlm.weights import cache as weights_cache
from mindvlm.weights.cache import entry_folder
from tests.checkpoint.test_write_errors import file_size_limit
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import write_tiny_vary
from tests.weights.lora.adapters import write_adapter

NAME = "language_model.embed_tokens.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path) -> Path:
    return write_tiny_tinyllava(tmp_path)


class Starts:
    """Loads one folder repeatedly; `lines` has the messages of the last load."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: list[str] = []

    def __call__(self, **options) -> dict[str, np.ndarray]:
        self.lines = []
        options = {"mode": "pynative", "weights": "float32", **options}
        loaded = mindvlm.load(self.folder, progress=self.lines.append, **options)
        return {name: parameter.asnumpy() for name, parameter in loaded.model.parameters_and_names()}

    @property
    def converted(self) -> bool:
        return any(line.startswith("converting ") for line in self.lines)


@pytest.fixture
def start(model, cache) -> Starts:
    return Starts(model)


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def spoil(path: Path) -> None:
    """Changes the values in a file but keeps its size and modification time."""
    stat, content = path.stat(), path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + b"\x55" * (len(content) - header))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_second_start_does_not_read_the_sources(start, model, cache):
    expected = start(cache=False)
    assert not cache.exists() and start.lines == [f"loading {model / 'model.safetensors'}"]

    assert_equal(start(), expected)
    entry = entry_folder(model / "model.safetensors")
    size = sum(array.nbytes for array in expected.values())
    assert start.lines == [
        f"converting {model / 'model.safetensors'}; converted weights are kept in {entry} ({size / 1000:.0f}kB)",
        f"loading {model / 'model.safetensors'}",
    ]
    assert entry.parent == cache and os.listdir(cache) == [entry.name]

    spoil(model / "model.safetensors")
    assert_equal(start(), expected)
    assert start.lines == [f"loading {entry / 'weights.safetensors'}"]
    assert start(cache=False)[NAME].max() != expected[NAME].max()


def test_numbers_are_kept_as_the_source_has_them(start, model):
    with open_checkpoint(model / "model.safetensors") as source:
        write_checkpoint(model / "half.safetensors", CastSource(source, "bfloat16"))
    os.replace(model / "half.safetensors", model / "model.safetensors")
    expected = start(cache=False)
    for _ in range(2):
        assert_equal(start(), expected)
    with open_checkpoint(entry_folder(model / "model.safetensors") / "weights.safetensors") as kept:
        assert {info.dtype for info in kept.infos.values()} == {"bfloat16"}


def rewrite(path: Path, factor: float) -> None:
    with open_checkpoint(path) as source:
        changed = {name: source.read(name).to_float32() * np.float32(factor) for name in source.infos}
    write_checkpoint(path, MemorySource(changed))


def test_changed_sources_are_converted_again(start, model, cache):
    before = start()
    rewrite(model / "model.safetensors", 2)
    assert_equal(start(), {name: 2 * array for name, array in before.items()})
    assert start.converted and len(os.listdir(cache)) == 1
    start()
    assert not start.converted
    os.utime(model / "model.safetensors")
    start()
    assert start.converted


def test_every_shard_and_the_index_count(start, model):
    os.rename(model / "model.safetensors", model.parent / "whole.safetensors")
    with open_checkpoint(model.parent / "whole.safetensors") as source:
        files = write_checkpoint(model, source, max_shard_size=60_000)
    expected = start()
    assert len(files) > 3
    for file in files:
        start()
        assert not start.converted
        os.utime(file)
        assert_equal(start(), expected)
        assert start.converted


def test_links_of_a_hugging_face_snapshot_are_followed(tmp_path, cache):
    """A hub snapshot links to blobs; a link to another blob is another source, even with equal size and time."""
    folder = tmp_path / "models--bczhou--TinyLLaVA-1.5B" / "snapshots" / "89e1"
    folder.parent.mkdir(parents=True)
    shutil.copytree(write_tiny_tinyllava(tmp_path), folder)
    blobs, link = folder.parent.parent / "blobs", folder / "model.safetensors"
    blobs.mkdir()
    for factor, name in ((1, "one"), (2, "two")):
        shutil.copy(link, blobs / f"{name}.safetensors")
        rewrite(blobs / f"{name}.safetensors", factor)
        os.utime(blobs / f"{name}.safetensors", ns=(10**18, 10**18))
    link.unlink()
    link.symlink_to("../../blobs/one.safetensors")
    start = Starts(folder)
    before = start()
    link.unlink()
    link.symlink_to("../../blobs/two.safetensors")
    assert_equal(start(), {name: 2 * array for name, array in before.items()})
    (entry,) = cache.iterdir()
    assert entry.name.startswith("models--bczhou--TinyLLaVA-1.5B-")
    (source,) = json.loads((entry / "manifest.json").read_text())["sources"]
    assert source == {
        "path": str(blobs / "two.safetensors"),
        "size": link.stat().st_size,
        "mtime_ns": 10**18,
    }


def cut(entry: Path) -> None:
    path = entry / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def lose_a_tensor(entry: Path) -> None:
    with open_checkpoint(entry / "weights.safetensors") as kept:
        fewer = {name: kept.read(name) for name in list(kept.infos)[1:]}
    write_checkpoint(entry / "weights.safetensors", MemorySource(fewer))


def of_another_version(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps(manifest | {"mindvlm": "0.0.1"}, indent=1) + "\n")


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def replace_by_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("no folder")


DAMAGES = {
    "cut": cut,
    "fewer tensors": lose_a_tensor,
    "no weights": lambda entry: (entry / "weights.safetensors").unlink(),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "half a manifest": lambda entry: os.truncate(entry / "manifest.json", 40),
    "other values": lambda entry: change_a_byte(entry / "weights.safetensors"),
    "another manifest": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe"),
    "another version": of_another_version,
    "a file": replace_by_a_file,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(start, cache, damage):
    expected = start()
    (entry,) = cache.iterdir()
    DAMAGES[damage](entry)
    assert_equal(start(), expected)
    assert start.converted
    assert_equal(start(), expected)
    assert not start.converted and list(cache.iterdir()) == [entry]


def test_what_a_killed_process_left_is_removed(start, cache, model):
    entry = entry_folder(model / "model.safetensors")
    left = cache / f".{entry.name}.{2**22 + 1}.staging"
    left.mkdir(parents=True)
    start()
    assert list(cache.iterdir()) == [entry]


def test_a_cache_that_cannot_be_made(start, tmp_path, monkeypatch):
    expected = start(cache=False)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="converted weights are not kept: .*/file.*Not a directory") as caught:
        assert_equal(start(), expected)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_disk_without_room(start, cache, monkeypatch):
    expected = start(cache=False)
    monkeypatch.setattr(weights_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.warns(UserWarning, match="are not kept: .*has 1.00kB free, they need .*make room or set MINDVLM"):
        assert_equal(start(), expected)
    assert not start.converted and os.listdir(cache) == []


def test_a_disk_that_is_full_in_the_middle(start, cache):
    expected = start(cache=False)
    with file_size_limit(20_000), pytest.warns(UserWarning, match="are not kept: .*File too large.*nothing was kept"):
        assert_equal(start(), expected)
    assert os.listdir(cache) == []


def test_an_adapter_goes_over_kept_weights(start, model, tmp_path):
    layer = "model.layers.1.self_attn.q_proj.lora_"
    tensors = {f"{layer}A.weight": torch.ones(2, 32), f"{layer}B.weight": torch.full((32, 2), 0.125)}
    options = {"adapter": write_adapter(tmp_path / "adapter", tensors)}
    expected = start(cache=False, **options)
    for _ in range(2):
        assert_equal(start(**options), expected)
    assert start.lines[-1].endswith(f"weights.safetensors with {tmp_path / 'adapter'}")
    name = "language_model.layers.1.self_attn.q_proj.weight"
    assert np.abs(start()[name] - expected[name]).max() == pytest.approx(0.5)


def test_native_weights_are_not_copied(tmp_path, cache):
    path = write_tiny_vary(tmp_path)
    mindvlm.load(path, weights="float32")
    assert not cache.exists()
