"""Folders: which file is the checkpoint, shards with an index, and indexes that lie."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mindvlm.checkpoint import open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.ones(2), "b": torch.arange(3.0)},
    "model-00002-of-00002.safetensors": {"c": torch.zeros(4)},
}


def write_shards(folder, weight_map=None):
    for file, tensors in SHARDS.items():
        save_file(tensors, folder / file)
    weight_map = weight_map or {name: file for file, tensors in SHARDS.items() for name in tensors}
    index = {"metadata": {"total_size": 36}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    write_shards(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert set(checkpoint.infos) == {"a", "b", "c"}
            assert checkpoint.read("b").data.tolist() == [0, 1, 2]
            assert {file.name for file in checkpoint.files} == set(SHARDS)


def test_an_index_with_a_byte_order_mark(tmp_path):
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert set(open_checkpoint(tmp_path).infos) == {"a", "b", "c"}


@pytest.mark.parametrize("name", [*SHARDS, "model.safetensors.index.json"])
def test_a_shard_or_index_that_is_a_git_lfs_pointer_is_named(tmp_path, name):
    write_shards(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 493443\n")
    with pytest.raises(UserError, match=f"{name}: a Git LFS pointer, not the file itself; run `git lfs pull`"):
        open_checkpoint(tmp_path)


def test_torch_shards(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(tmp_path).infos) == {"a", "b"}


def test_shards_that_are_links_as_in_a_hub_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_shards(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert set(open_checkpoint(tmp_path / "snapshot").infos) == {"a", "b", "c"}


def test_a_single_file_of_any_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    torch.save({"step": 1}, tmp_path / "training_args.bin")
    assert open_checkpoint(tmp_path).path == tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"2 weights files \(other.safetensors, weights.safetensors\)"):
        open_checkpoint(tmp_path)


def test_a_ckpt_made_from_the_one_other_file_is_not_meant(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        write_checkpoint(tmp_path / "vary_toy.ckpt", checkpoint)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.path.name == "weights.safetensors"


def test_texts_on_which_the_shards_agree_are_kept(tmp_path):
    for number, tensors in enumerate(SHARDS.items()):
        save_file(tensors[1], tmp_path / tensors[0], metadata={"format": "pt", "number": str(number)})
    weight_map = {name: file for file, tensors in SHARDS.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}


def test_more_shards_than_files_may_be_open(tmp_path):
    names = [f"model-{i:05}.safetensors" for i in range(40)]
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.full((2,), i)}, tmp_path / name)
    weight_map = {f"t{i}": name for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as checkpoint:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            assert [int(checkpoint.read(f"t{i}").data[0]) for i in range(40)] == list(range(40))
        assert len(os.listdir("/proc/self/fd")) <= before + 16


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "same folder"),
        ({"a": "/etc/secret.safetensors"}, "same folder"),
        ({"a": "sub/secret.safetensors"}, "same folder"),
        ({"a": "..\\secret.safetensors"}, "same folder"),
        ({"a": ".."}, "same folder"),
        ({"a": "x\n.safetensors"}, "same folder"),
        ({"a": 3}, "same folder"),
        ({"a": "passwd"}, "expected one of"),
        ({"a": "model.safetensors.index.json"}, "expected one of"),
        ({"a": "model-00003-of-00003.safetensors"}, "not in the folder"),
        ({"a": "model-00002-of-00002.safetensors"}, "says that tensor 'a'"),
        ({"a": "model-00001-of-00002.safetensors"}, "does not list tensor 'b'"),
    ],
)
def test_lying_indexes(weight_map, message, tmp_path):
    write_shards(tmp_path, weight_map)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}}', "[" * 100_000, "\x00\xff"])
def test_damaged_indexes(text, tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
