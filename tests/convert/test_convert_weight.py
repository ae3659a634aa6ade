"""The converter's command line: every source and target format, casts, proof, and one-line errors."""

import json
import os
import re
import shutil

import mindspore
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert import convert_weight
from mindvlm.models.vary.hf_config import vary_toy_config
from mindvlm.weights.recognise import native_view
from tests.known_models import VARY
from tests.models.vary.vary_names import SMALL, hf_shapes


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in hf_shapes(SMALL).items()}


def write_shards(folder, tensors):
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for index in range(3):
        file = f"model-{index + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[index::3]}, folder / file)
        weight_map |= dict.fromkeys(names[index::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_source(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix:
        torch.save(tensors, path, _use_new_zipfile_serialization=path.suffix != ".pt")
    else:
        write_shards(path, tensors)


def native(tensors, dtype=torch.float32) -> dict[str, np.ndarray]:
    view = native_view(MemorySource({name: tensor.to(dtype).numpy() for name, tensor in tensors.items()}), VARY)
    return {name: view.read(name).data for name in view.infos}


def run(*arguments) -> int:
    return convert_weight.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("source", ["pytorch_model.bin", "legacy.pt", "model.safetensors", "shards"])
@pytest.mark.parametrize("target", ["out.ckpt", "out.safetensors"])
def test_every_source_to_every_target(source, target, tensors, tmp_path, capsys):
    write_source(tmp_path / source, tensors)
    assert run("--torch_ckpt_path", tmp_path / source, "--mindspore_ckpt_path", tmp_path / target, "--verify") == 0
    output = capsys.readouterr().out
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    size = (tmp_path / target).stat().st_size
    assert size > 2 * num_parameters
    assert f"{num_parameters:,} parameters, {size:,} bytes, dtype keep" in output
    assert f"verified: all {len(tensors)} tensors" in output
    assert "language_model.layers.{}.self_attn.[q|k|v]_proj.weight" in output
    with open_checkpoint(tmp_path / target) as checkpoint:
        expected = native(tensors)
        assert set(checkpoint.infos) == set(expected)
        for name, array in expected.items():
            assert checkpoint.infos[name].dtype == "bfloat16"
            assert np.array_equal(checkpoint.read(name).to_float32(), array)


def test_mindspore_loads_the_result(tensors, tmp_path):
    write_source(tmp_path / "model.bin", tensors)
    target = tmp_path / "out.ckpt"
    assert run("--torch_ckpt_path", tmp_path, "--mindspore_ckpt_path", target, "--dtype", "float32") == 0
    loaded = mindspore.load_checkpoint(str(target))
    for name, array in native(tensors).items():
        assert np.array_equal(loaded[name].asnumpy(), array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_casts(dtype, tensors, tmp_path):
    source = {name: tensor.float() + 1e-4 for name, tensor in tensors.items()}
    write_source(tmp_path / "in.safetensors", source)
    target = tmp_path / "out.safetensors"
    assert run(
        "--torch_ckpt_path", tmp_path / "in.safetensors", "--mindspore_ckpt_path", target, "--dtype", dtype, "--verify"
    ) == 0  # fmt: skip
    with open_checkpoint(target) as checkpoint:
        for name, array in native(source).items():
            assert checkpoint.infos[name].dtype == dtype
            expected = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
            assert np.array_equal(checkpoint.read(name).to_float32(), expected)


def test_values_beyond_float16_are_an_error_that_names_the_tensor(tensors, tmp_path, capsys):
    source = {name: tensor.float() for name, tensor in tensors.items()}
    source["transformer.h.1.mlp.w1.weight"][3, 2] = 7e4
    write_source(tmp_path / "in.safetensors", source)
    target = tmp_path / "out.ckpt"
    assert run("--torch_ckpt_path", tmp_path, "--mindspore_ckpt_path", target, "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert "language_model.layers.1.mlp.up_proj.weight" in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_nan_is_kept_and_the_summary_names_it(tensors, tmp_path, capsys):
    names = [f"transformer.h.{layer}.ln_1.weight" for layer in range(2)]
    ruined = tensors | {name: tensors[name].clone() for name in names}
    ruined[names[0]][3], ruined[names[1]][0] = float("nan"), float("-inf")
    write_source(tmp_path / "model.safetensors", ruined)
    assert run("--source", tmp_path / "model.safetensors", "--target", tmp_path / "out.ckpt", "--verify") == 0
    what = "kept as it is: transformer.h.{}.ln_1.weight (2 tensors)"
    assert f"NaN or infinity in {tmp_path / 'model.safetensors'}, {what}\n" in capsys.readouterr().out
    with open_checkpoint(tmp_path / "out.ckpt") as checkpoint:
        values = checkpoint.read("language_model.layers.0.input_layernorm.weight").to_float32()
    assert np.flatnonzero(np.isnan(values)).tolist() == [3]


def test_converting_twice_is_converting_once(tensors, tmp_path, capsys):
    write_source(tmp_path / "in.bin", tensors)
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    assert run("--torch_ckpt_path", tmp_path / "in.bin", "--mindspore_ckpt_path", once) == 0
    assert run("--torch_ckpt_path", once, "--mindspore_ckpt_path", twice) == 0
    assert once.read_bytes() == twice.read_bytes()
    assert "native names: all 139 tensors stay as they are" in capsys.readouterr().out


def test_the_default_target_lies_beside_the_source(tensors, tmp_path):
    write_source(tmp_path / "in.bin", tensors)
    assert run("--torch_ckpt_path", tmp_path / "in.bin") == 0
    assert (tmp_path / "vary_toy.ckpt").is_file()


def test_a_checkpoint_that_does_not_fit_gets_a_table_and_status_2(tensors, tmp_path, capsys):
    source = {name: tensor for name, tensor in tensors.items() if not name.endswith("lin1.bias")}
    source["transformer.stranger"] = torch.ones(2)
    write_source(tmp_path / "in.bin", source)
    assert run("--torch_ckpt_path", tmp_path / "in.bin", "--mindspore_ckpt_path", tmp_path / "out.ckpt") == 2
    captured = capsys.readouterr()
    assert "3 missing, 1 unexpected" in captured.err and captured.err.count("\n") == 1
    lines = captured.out.splitlines()
    assert any(line.split()[:3] == ["missing", "3", "transformer.vision_tower_high.blocks.{}.mlp.lin1.bias"]
               for line in lines)  # fmt: skip
    assert any("transformer.stranger" in line for line in lines)
    assert os.listdir(tmp_path) == ["in.bin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mindspore_ckpt_path", "{folder}/out.onnx"], "end the name with"),
        (["--mindspore_ckpt_path", "{folder}/none/out.ckpt"], "does not exist"),
        (["--mindspore_ckpt_path", "{folder}/in.safetensors"], "is a source and would be replaced"),
        (["--model", "vary_toi"], "'vary_toi' is unknown; expected one of: vary_toy"),
        (["--dtype", "int8"], "expected one of: keep, float32, float16, bfloat16"),
        (["--torch_ckpt_path", "{folder}/absent.bin"], "no such file"),
        (["--torch_ckpt_path", "{folder}/other.bin"], "not a known model"),
        (["--torch_ckpt_path", "{folder}/damaged.bin"], "damaged"),
    ],
)
def test_one_line_errors(arguments, message, tensors, tmp_path, capsys):
    write_source(tmp_path / "in.safetensors", tensors)
    torch.save({"a": torch.ones(2)}, tmp_path / "other.bin")
    (tmp_path / "damaged.bin").write_bytes((tmp_path / "other.bin").read_bytes()[:-30])
    before = sorted(os.listdir(tmp_path))
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert run("--torch_ckpt_path", tmp_path / "in.safetensors", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert sorted(os.listdir(tmp_path)) == before


def test_the_disk_is_asked_before_writing(tensors, tmp_path, monkeypatch, capsys):
    write_source(tmp_path / "in.bin", tensors)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr("mindvlm.convert.publishing.shutil.disk_usage", lambda path: usage(10, 5, 5))
    assert run("--torch_ckpt_path", tmp_path / "in.bin") == 2
    assert "make room" in capsys.readouterr().err


def test_interruption_leaves_nothing(tensors, tmp_path, monkeypatch):
    write_source(tmp_path / "in.bin", tensors)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mindvlm.checkpoint.atomic.os.fsync", interrupted)
    assert run("--torch_ckpt_path", tmp_path / "in.bin") == 130
    assert os.listdir(tmp_path) == ["in.bin"]


@pytest.mark.parametrize("change", ["swap", "bit", "lose", "add"])
def test_verification_finds_a_planted_error(change, tensors, tmp_path, capsys):
    write_source(tmp_path / "in.safetensors", tensors)
    target = tmp_path / "out.safetensors"
    arguments = ["--torch_ckpt_path", tmp_path / "in.safetensors", "--mindspore_ckpt_path", target]
    assert run(*arguments) == 0
    assert run(*arguments, "--verify_only") == 0
    assert "nothing was written" in capsys.readouterr().out
    with open_checkpoint(target) as checkpoint:
        written = {name: checkpoint.read(name) for name in checkpoint.infos}
    gate, up = (f"language_model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    if change == "swap":
        written[gate], written[up] = written[up], written[gate]
    elif change == "bit":
        written[up].data[3, 1] ^= 1
    elif change == "lose":
        del written[up]
    else:
        written["mm_projector.stranger"] = written[up]
    write_checkpoint(target, MemorySource(written))
    planted = target.read_bytes()
    assert run(*arguments, "--verify_only") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"h\.0\.mlp\.w[12]\.weight|\.0\.mlp\.up_proj\.weight is missing|mm_projector\.stranger", error)
    assert target.read_bytes() == planted


@pytest.mark.parametrize("in_folder", [False, True])
def test_shapes_are_checked_against_the_config_beside_the_weights(tmp_path, capsys, in_folder):
    tensors = {name: torch.zeros(shape) for name, shape in hf_shapes(SMALL).items()}
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    config = vary_toy_config()
    (source / "config.json").write_text(json.dumps(config))
    path = source if in_folder else source / "model.safetensors"

    status = convert_weight.main(
        ["--torch_ckpt_path", str(path), "--mindspore_ckpt_path", str(tmp_path / "out.safetensors")]
    )

    assert status == 2
    assert "[2048, 2048]" in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()
