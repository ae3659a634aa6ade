"""Whole conversions: the way back, layers, parts, adapters, dry runs and reports."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mindvlm.checkpoint import MemorySource, TensorSource, open_checkpoint, write_checkpoint
from mindvlm.convert import convert_weight
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.errors import UserError
from tests.models.vary.vary_names import (
    SMALL,
    SMALL_TINY,
    clip_file_shapes,
    hf_shapes,
    mindocr_name,
    random_tensors,
    sam_file_shapes,
    tiny_shapes,
)
from tests.weights.lora.adapters import write_adapter


def write(path, shapes, *, seed=3):
    write_checkpoint(path, MemorySource(random_tensors(shapes, seed=seed)))
    return path


def write_float32(path, shapes):
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_checkpoint(path, MemorySource(tensors))
    return path


def run(*arguments) -> int:
    return convert_weight.main([str(argument) for argument in arguments])


def contents(path) -> dict:
    with open_checkpoint(path) as checkpoint:
        return {name: (i.dtype, i.shape, checkpoint.read(name).data.tobytes()) for name, i in checkpoint.infos.items()}


NAMINGS = {
    "toy": hf_shapes(SMALL),
    "tiny": tiny_shapes(SMALL_TINY),
    "tiny, other tower name": tiny_shapes(SMALL_TINY, "vision_tower"),
    "tiny, head not stored": {n: s for n, s in tiny_shapes(SMALL_TINY).items() if n != "lm_head.weight"},
}


@pytest.mark.parametrize("middle", ["middle.safetensors", "middle.ckpt", "middle"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_the_way_back_gives_the_same_file(naming, middle, tmp_path):
    source = tmp_path / "model.safetensors"
    tensors = random_tensors(NAMINGS[naming])
    write_checkpoint(source, MemorySource(tensors), metadata={"format": "pt", "made": "by hand"})
    assert run("--torch_ckpt_path", source, "--mindspore_ckpt_path", tmp_path / middle, "--verify") == 0
    back = tmp_path / "back.safetensors"
    arguments = ["--torch_ckpt_path", tmp_path / middle, "--mindspore_ckpt_path", back, "--to", "hf", "--verify"]
    assert run(*arguments) == 0
    assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("middle", ["middle.safetensors", "middle.ckpt"])
def test_computed_buffers_come_back_too(middle, tmp_path):
    tensors = dict(random_tensors(hf_shapes(SMALL)))
    position_ids = np.arange(257, dtype=np.int64)[None]
    tensors["transformer.vision_tower.vision_model.embeddings.position_ids"] = position_ids
    tensors["transformer.rotary_emb.inv_freq"] = np.linspace(1, 0, 64, dtype=np.float32)
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.float16(-1e4)
    source, back = tmp_path / "in.safetensors", tmp_path / "back.safetensors"
    write_checkpoint(source, MemorySource(tensors))
    assert run("--torch_ckpt_path", source, "--mindspore_ckpt_path", tmp_path / middle, "--verify") == 0
    arguments = ["--torch_ckpt_path", tmp_path / middle, "--mindspore_ckpt_path", back, "--to", "hf", "--verify"]
    assert run(*arguments, "--report", tmp_path / "report.json") == 0
    assert contents(back) == contents(source)


def test_mindocr_files_become_hugging_face_files(tmp_path):
    tensors = random_tensors(hf_shapes(SMALL))
    back = tmp_path / "back.safetensors"
    mindocr = {}
    for name, tensor in tensors.items():
        if "c_attn" in name:
            size = tensor.shape[0] // 3
            for i, letter in enumerate("qkv"):
                part = tensor.data[i * size : (i + 1) * size]
                new = name.replace(".h.", ".layers.").replace("attn.c_attn", f"attention.w{letter}")
                mindocr[new] = type(tensor)(tensor.dtype, part.shape, part)
        else:
            mindocr[mindocr_name(name)] = tensor
    write_checkpoint(tmp_path / "mindocr.ckpt", MemorySource(mindocr))
    arguments = ["--torch_ckpt_path", tmp_path / "mindocr.ckpt", "--mindspore_ckpt_path", back, "--to", "hf"]
    assert run(*arguments, "--verify") == 0
    write_checkpoint(tmp_path / "hf.safetensors", MemorySource(tensors))
    assert contents(back) == contents(tmp_path / "hf.safetensors")


def test_shards_come_back_and_other_readers_open_them(tmp_path):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    shards, back = tmp_path / "shards", tmp_path / "back.safetensors"
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", shards, "--to", "hf", "--max_shard_size", "4KB"]
    assert run(*arguments) == 0
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(hf_shapes(SMALL)) and len(set(index["weight_map"].values())) > 3
    for name, shard in index["weight_map"].items():
        with safe_open(shards / shard, "pt") as file:
            assert tuple(file.get_tensor(name).shape) == hf_shapes(SMALL)[name]
    assert run("--torch_ckpt_path", shards, "--mindspore_ckpt_path", back, "--to", "hf") == 0
    assert contents(back) == contents(source)


def test_a_model_folder_gets_its_config_and_tokenizer_back(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    write(folder / "model.safetensors", {n: s for n, s in hf_shapes(SMALL).items() if "mm_projector" in n})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("")
    back = tmp_path / "back"
    assert run("--torch_ckpt_path", folder, "--mindspore_ckpt_path", back, "--to", "hf") == 0
    assert sorted(os.listdir(back)) == ["model.safetensors", "tokenizer.json"]


def test_later_sources_override_earlier_ones(tmp_path, capsys):
    base = write(tmp_path / "base.safetensors", hf_shapes(SMALL), seed=1)
    tower = write(tmp_path / "tower.safetensors", clip_file_shapes(SMALL), seed=2)
    names = [name for name in hf_shapes(SMALL) if "mm_projector" in name]
    projector = write(
        tmp_path / "mm_projector.safetensors",
        {name.replace("transformer.", "model."): hf_shapes(SMALL)[name] for name in names},
        seed=5,
    )
    target, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    sources = ["--torch_ckpt_path", base, tower, projector]
    assert run(*sources, "--mindspore_ckpt_path", target, "--verify", "--report", report) == 0
    assert "CLIP names" in capsys.readouterr().out
    written = contents(target)
    fc1 = "encoder.layers.1.mlp.fc1.weight"
    assert written[f"vision_tower.{fc1}"] == contents(tower)[f"vision_model.{fc1}"]
    assert written["mm_projector.weight"] == contents(projector)["model.mm_projector.weight"]
    assert written["language_model.norm.weight"] == contents(base)["transformer.ln_f.weight"]
    record = json.loads(report.read_text())
    origin = {tensor["name"]: tensor["origin"] for tensor in record["tensors"]}
    assert origin[f"vision_tower.{fc1}"] == [{"source": 1, "names": [f"vision_model.{fc1}"]}]
    assert origin["mm_projector.weight"] == [{"source": 2, "names": ["model.mm_projector.weight"]}]
    assert origin["language_model.layers.0.self_attn.k_proj.bias"][0]["source"] == 0


@pytest.mark.parametrize(
    ("shapes", "first"),
    [
        (hf_shapes(SMALL), "transformer.vision_tower_high."),
        (tiny_shapes(SMALL_TINY), "model.vision_tower_2."),
        (tiny_shapes(SMALL_TINY, "vision_tower"), "model.vision_tower."),
        (sam_file_shapes(SMALL), "image_encoder."),
    ],
)
def test_the_vision_vocabulary_is_handed_over(shapes, first, tmp_path, capsys):
    tensors = random_tensors(shapes)
    source = tmp_path / "in.safetensors"
    write_checkpoint(source, MemorySource(tensors))
    vocabulary = tmp_path / "vocabulary.safetensors"
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", vocabulary, "--only", "vision_vocabulary"]
    assert run(*arguments, "--verify") == 0
    assert "partial: missing parts: language model" in capsys.readouterr().out
    expected = {n: v for n, v in contents(source).items() if n.startswith(first)}
    assert contents(vocabulary) == {n.replace(first, "vision_vocabulary."): v for n, v in expected.items()}
    base = write(tmp_path / "base.safetensors", hf_shapes(SMALL), seed=9)
    arguments = ["--torch_ckpt_path", base, vocabulary, "--mindspore_ckpt_path", tmp_path / "new.ckpt", "--verify"]
    assert run(*arguments, "--model", "vary_toy") == 0
    assert contents(tmp_path / "new.ckpt").items() >= contents(vocabulary).items()


@pytest.mark.parametrize("names", ["hf", "native"])
@pytest.mark.parametrize("base", ["hf", "native"])
def test_an_adapter_is_merged_under_either_names(base, names, tmp_path):
    source = write_float32(tmp_path / "in.safetensors", hf_shapes(SMALL))
    generator = torch.Generator().manual_seed(0)
    hidden = SMALL["hidden"]

    def factors(name, rows):
        shapes = {"A": (2, hidden), "B": (rows, 2)}
        return {f"{name}.lora_{k}.weight": torch.randn(s, generator=generator) for k, s in shapes.items()}

    if names == "hf":
        lora = {k: t for i in range(2) for k, t in factors(f"transformer.h.{i}.attn.c_attn", 3 * hidden).items()}
        targets = ["c_attn"]
    else:
        parts = [f"language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
        lora = {k: t for part in parts for k, t in factors(part, hidden).items()}
        targets = ["q_proj", "k_proj", "v_proj"]
        targets = parts
    adapter = write_adapter(tmp_path / "adapter", lora, target_modules=targets)
    if base == "native":
        native = tmp_path / "native.ckpt"
        assert run("--torch_ckpt_path", source, "--mindspore_ckpt_path", native) == 0
        source = native
    target, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", target, "--merge_lora", adapter]
    assert run(*arguments, "--verify", "--report", report) == 0
    with open_checkpoint(tmp_path / "in.safetensors") as checkpoint:
        weight = torch.from_numpy(checkpoint.read("transformer.h.1.attn.c_attn.weight").data.copy())
    if names == "hf":
        key = "transformer.h.1.attn.c_attn"
        delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
    else:
        keys = [f"language_model.layers.1.self_attn.{p}_proj" for p in "qkv"]
        delta = torch.cat([lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"] for key in keys])
    expected = (weight + 2 * delta).chunk(3)
    with open_checkpoint(target) as checkpoint:
        for part, wanted in zip("qkv", expected, strict=True):
            found = checkpoint.read(f"language_model.layers.1.self_attn.{part}_proj.weight").data
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6, atol=1e-6)
    record = json.loads(report.read_text())
    origin = {tensor["name"]: tensor["origin"] for tensor in record["tensors"]}
    assert [o["source"] for o in origin["language_model.layers.1.self_attn.k_proj.weight"]] == [0, 1]
    assert record["sources"][1]["role"] == "adapter"
    assert record["verification"]["planned_tensors_equal"] == 6


def test_a_dry_run_writes_nothing_and_reports(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    report = tmp_path / "report.json"

    def refuse(self, *arguments):
        raise AssertionError("a dry run reads headers only")

    monkeypatch.setattr("mindvlm.checkpoint.stored.Checkpoint.read_range", refuse)
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", tmp_path / "out.ckpt", "--dtype", "float32"]
    assert run(*arguments, "--dry_run", "--report", report) == 0
    assert "dry run, nothing was written" in capsys.readouterr().out
    record = json.loads(report.read_text())
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "report.json"]
    assert record["outputs"] == [] and record["totals"]["by_dtype"].keys() == {"float32"}


def test_the_report_holds_hashes_statistics_and_rules(tmp_path):
    source = write_float32(tmp_path / "in.safetensors", hf_shapes(SMALL))
    report, target = tmp_path / "report.json", tmp_path / "out.safetensors"
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", target, "--dtype", "bfloat16"]
    assert run(*arguments, "--report", report, "--verify") == 0
    record = json.loads(report.read_text())
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    assert record["sources"][0]["files"][0]["sha256"] == digest
    with open_checkpoint(target) as checkpoint:
        for tensor in record["tensors"]:
            values = checkpoint.read(tensor["name"]).to_float32().astype(np.float64)
            assert tensor["statistics"]["norm"] == pytest.approx(np.sqrt((values**2).sum()), rel=1e-12)
            assert tensor["statistics"]["sum"] == pytest.approx(values.sum(), rel=1e-9, abs=1e-9)
    assert sum(rule["used"] for rule in record["rules"]) == len(hf_shapes(SMALL))
    assert record["unused_rules"] and record["model"] == "vary_toy" and record["peak_memory_bytes"] > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "towers"], "is not a part of vary_toy; expected one of: language_model, vision_tower"),
        (["--to", "torch"], "expected one of: native, hf"),
        (["--to", "hf"], "--mindspore_ckpt_path"),
        (["--verify", "maybe"], "expected one of: tensors, logits"),
        (["--max_shard_size", "many"], "'many' is not a size"),
        (["--merge_lora", "{folder}"], "adapter_config.json"),
        (["--report", "{folder}"], "is a folder"),
    ],
)
def test_one_line_errors(arguments, message, tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert run("--torch_ckpt_path", source, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_a_folder_of_shards_is_not_overwritten_by_its_own_conversion(tmp_path, capsys):
    shards = tmp_path / "shards"
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", shards, "--to", "hf", "--max_shard_size", "4KB"]
    assert run(*arguments) == 0
    before = contents(shards)
    assert run("--torch_ckpt_path", shards, "--mindspore_ckpt_path", shards) == 2
    assert "would be replaced" in capsys.readouterr().err
    assert contents(shards) == before


class _Slow(TensorSource):
    """Prints a line and waits before it returns a tensor."""

    def __init__(self, source):
        self.path, self.infos, self._source = source.path, source.infos, source

    def read_range(self, name, start, stop):
        print("reading", flush=True)
        time.sleep(60)
        return self._source.read_range(name, start, stop)


def convert_slowly(source, target):
    """Run by `test_a_stopped_conversion_leaves_nothing` in a separate process."""
    import mindvlm.convert.conversion as conversion

    write_at_once = conversion.write_checkpoint
    conversion.write_checkpoint = lambda path, tensors, **options: write_at_once(path, _Slow(tensors), **options)
    return run("--torch_ckpt_path", source, "--mindspore_ckpt_path", target)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing(kind, tmp_path):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    code = (
        "import sys; from tests.convert.test_conversion import convert_slowly; sys.exit(convert_slowly(*sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out.ckpt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        assert any(name.endswith(".staging") for name in os.listdir(tmp_path))
        process.send_signal(kind)
        assert process.wait(20) == 130
        assert process.stderr.read() == "interrupted: nothing was kept\n"
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_a_killed_conversion_is_cleaned_up_by_the_next(tmp_path):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    stale = subprocess.Popen(["true"])
    stale.wait()
    (tmp_path / f".out.ckpt.{stale.pid}.staging").mkdir()
    (tmp_path / f".out.ckpt.{stale.pid}.staging" / "out.ckpt").write_bytes(b"half")
    convert(ConversionRequest(sources=(source,), target=tmp_path / "out.ckpt"))
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.ckpt"]


@pytest.mark.parametrize("kind", ["in.safetensors", "out.safetensors"])
def test_a_report_never_replaces_weights(kind, tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    before = source.read_bytes()
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", tmp_path / "out.safetensors"]
    assert run(*arguments, "--report", tmp_path / kind) == 2
    assert "give the report a name of its own" in capsys.readouterr().err
    assert source.read_bytes() == before and os.listdir(tmp_path) == ["in.safetensors"]


def test_what_fails_its_proof_replaces_nothing_and_is_reported(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    target, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    target.write_bytes(b"an earlier one")

    def refuse(*arguments, **options):
        raise UserError("tensor x differs")

    monkeypatch.setattr("mindvlm.convert.conversion.verify_conversion", refuse)
    arguments = ["--torch_ckpt_path", source, "--mindspore_ckpt_path", target, "--verify", "--report", report]
    assert run(*arguments) == 2
    assert capsys.readouterr().err == "error: tensor x differs\n"
    assert target.read_bytes() == b"an earlier one"
    assert json.loads(report.read_text())["verification"] == {"passed": False, "failure": "tensor x differs"}
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors", "report.json"]


def test_the_companions_belong_to_the_weights_they_lie_beside(tmp_path):
    target = tmp_path / "hf"
    for text in ('{"first": 1}', '{"second": 2}'):
        folder = tmp_path / f"source{len(text)}"
        folder.mkdir()
        write(folder / "model.safetensors", {n: s for n, s in hf_shapes(SMALL).items() if "mm_projector" in n})
        (folder / "tokenizer.json").write_text(text)
        assert run("--torch_ckpt_path", folder, "--mindspore_ckpt_path", target, "--to", "hf") == 0
        assert (target / "tokenizer.json").read_text() == text


def test_the_companions_of_a_whole_do_not_describe_a_part(tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder / "model.safetensors", hf_shapes(SMALL))
    # each of them is needed to open the folder again
    names = ("arcade100k.tiktoken", "arcade100k.tiktoken.txt", "tokenizer.model")
    for name in (*names, "vision_config.json"):
        (folder / name).write_text("{}")
    for target, options in (("whole", ()), ("part", ("--only", "projectors"))):
        assert run("--torch_ckpt_path", folder, "--mindspore_ckpt_path", tmp_path / target, "--to", "hf", *options) == 0
        assert ("model folder needs" in capsys.readouterr().out) is False
    assert set(names) < set(os.listdir(tmp_path / "whole"))
    # a file of TinyLLaVA's folders
    assert "vision_config.json" not in os.listdir(tmp_path / "whole")
    assert os.listdir(tmp_path / "part") == ["model.safetensors"]


@pytest.mark.parametrize("option", ["--target", "--merge_lora", "--max_shard_size", "--report", "--only"])
def test_an_empty_value_is_an_error(option, tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    with pytest.raises(SystemExit) as stop:
        run("--torch_ckpt_path", source, option, "")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "is empty" in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_a_wrong_model_does_not_silently_drop_the_rest(tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", hf_shapes(SMALL))
    assert run("--torch_ckpt_path", source, "--model", "vary_tiny") == 2
    assert "vision_vocabulary" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_two_models_in_one_file_are_an_error(tmp_path):
    shapes = {**hf_shapes(SMALL), **{f"model.{n}": s for n, s in hf_shapes(SMALL).items()}}
    source = write(tmp_path / "in.safetensors", shapes)
    with pytest.raises(UserError, match="unexpected|not a known model"):
        convert(ConversionRequest(sources=(source,), target=tmp_path / "out.ckpt"))
