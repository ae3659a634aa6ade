"""The table of a checkpoint: every tensor in exactly one line, equal ones together, numbers that add up."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.inspection import inspect_table
from tests.checkpoint.samples import state_dicts, write_legacy, write_safetensors


def table_of(path) -> str:
    with open_checkpoint(path) as checkpoint:
        return inspect_table(checkpoint)


def rows_of(table: str) -> list[list[str]]:
    """The cells between the rule under the heading and the one over the totals."""
    lines = table.splitlines()
    first, last = [index for index, line in enumerate(lines) if line and set(line) == {"-"}][:2]
    return [re.split(r"\s{2,}", line) for line in lines[first + 1 : last]]


def model() -> dict[str, torch.Tensor]:
    tensors = {"embed.weight": torch.zeros(1000, 64, dtype=torch.bfloat16)}
    for layer in range(12):
        tensors[f"layers.{layer}.q.weight"] = torch.zeros(64, 64)
        tensors[f"layers.{layer}.q.bias"] = torch.zeros(64, dtype=torch.float16 if layer == 5 else torch.float32)
    return {**tensors, "step": torch.tensor(7)}


def test_layers_share_a_line_if_dtype_and_shape_agree(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", model())
    table = table_of(tmp_path / "m.safetensors")
    assert sorted(rows_of(table)) == sorted(
        [
            ["bfloat16", "[1000, 64]", "1", "64,000", "128,000", "embed.weight"],
            ["float32", "[64, 64]", "12", "49,152", "196,608", "layers.{}.q.weight (0-11)"],
            ["float32", "[64]", "11", "704", "2,816", "layers.{}.q.bias (0-4, 6-11)"],
            ["float16", "[64]", "1", "64", "128", "layers.5.q.bias"],
            ["int64", "[]", "1", "1", "8", "step"],
        ]
    )
    lines = table.splitlines()
    assert lines[0] == f"{tmp_path / 'm.safetensors'}: safetensors, 26 tensors"
    assert re.split(r"\s+", lines[-1]) == ["total", "26", "113,921", "327,560"]
    totals = {tuple(line.split()) for line in lines[-5:-1]}
    assert ("float32", "23", "49,856", "199,424") in totals and ("int64", "1", "1", "8") in totals


def test_columns_are_aligned(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", model())
    lines = table_of(tmp_path / "m.safetensors").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("dtype"))
    heading = lines[start]
    name, number = heading.index("name"), heading.index("bytes") + len("bytes")
    rows = [line for line in lines[start + 2 :] if set(line) != {"-"}]
    assert len(rows) == 5 + 4 + 1
    for line in rows:
        assert line[number - 1].isdigit() and line[number:name].strip() == ""
    assert max(map(len, lines[1:])) <= 100


@settings(max_examples=40)
@given(state_dicts, st.sampled_from(["zip.bin", "safetensors", "ckpt"]))
def test_any_file_adds_up(tmp_path_factory, tensors, ending):
    path = tmp_path_factory.mktemp("file") / f"a.{ending}"
    if ending == "zip.bin":
        torch.save(tensors, path)
    elif ending == "safetensors":
        write_safetensors(path, tensors)
    else:
        plain = {name: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for name, t in tensors.items()}
        write_checkpoint(path, MemorySource(plain))
    with open_checkpoint(path) as checkpoint:
        infos = list(checkpoint.infos.values())
        rows = rows_of(inspect_table(checkpoint))
    assert sum(int(row[2].replace(",", "")) for row in rows) == len(infos)
    assert sum(int(row[3].replace(",", "")) for row in rows) == sum(info.num_elements for info in infos)
    assert sum(int(row[4].replace(",", "")) for row in rows) == sum(info.num_bytes for info in infos)
    assert {row[0] for row in rows} == {info.dtype for info in infos}


def test_numbers_at_two_places(tmp_path):
    tensors = {f"h.{i}.experts.{j}.w": torch.zeros(2) for i in range(2) for j in range(3)}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    names = [row[5] for row in rows_of(table_of(tmp_path / "m.safetensors"))]
    assert names == ["h.0.experts.{}.w (0-2)", "h.1.experts.{}.w (0-2)"]


def test_a_number_that_does_not_vary_stays(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {f"h.{i}.net.0.w": torch.zeros(2) for i in (0, 2)})
    assert [row[5] for row in rows_of(table_of(tmp_path / "m.safetensors"))] == ["h.{}.net.0.w (0, 2)"]


def test_an_optimizer_state_and_its_texts(tmp_path):
    tensors = {"global_step": np.array(9, np.int32)}
    for kind in ("moment1", "moment2"):
        tensors |= {f"{kind}.layers.{i}.weight": np.zeros((2, 3), np.float32) for i in range(3)}
    metadata = {"run": "a" * 500, "escape": "\x1b[31mred\n", **{f"k{i}": "v" for i in range(30)}}
    write_checkpoint(tmp_path / "o.ckpt", MemorySource(tensors), metadata=metadata)
    table = table_of(tmp_path / "o.ckpt")
    assert table.splitlines()[0].endswith("MindSpore checkpoint, 7 tensors")
    assert ["float32", "[2, 3]", "3", "18", "72", "moment2.layers.{}.weight (0-2)"] in rows_of(table)
    assert "  escape: \\x1b[31mred\\n" in table.splitlines() and "\x1b" not in table
    assert f"  run: {'a' * 96}..." in table.splitlines() and "... and 16 more" in table


def test_tensors_stored_once_under_two_names(tmp_path):
    shared = torch.zeros(8, 4)
    write_legacy(tmp_path / "m.bin", {"embed.weight": shared, "head.weight": shared, "part": shared[:2]})
    table = table_of(tmp_path / "m.bin")
    assert table.splitlines()[-1] == "stored once: embed.weight = head.weight"
    assert table.splitlines()[0].endswith("PyTorch, 3 tensors")


def test_shards_are_listed(tmp_path):
    tensors = {f"h.{i}.w": np.zeros(1000, np.float32) for i in range(12)}
    write_checkpoint(tmp_path / "model.safetensors", MemorySource(tensors), max_shard_size=4500)
    lines = table_of(tmp_path).splitlines()
    assert lines[0].endswith("model.safetensors.index.json: safetensors in shards, 12 tensors")
    assert lines[1].startswith("files: ") and lines[1].endswith(" bytes in 12")
    assert re.fullmatch(r"  model-00001-of-00012.safetensors: [0-9,]+ bytes", lines[2])
    assert "  ... and 4 more" in lines


@pytest.mark.parametrize("num_tensors", [5000])
def test_large_models_take_no_time(tmp_path, num_tensors):
    tensors = {f"h.{i}.{part}.w": np.zeros(1, np.float32) for i in range(num_tensors // 5) for part in "abcde"}
    write_checkpoint(tmp_path / "m.safetensors", MemorySource(tensors))
    assert len(rows_of(table_of(tmp_path / "m.safetensors"))) == 5
