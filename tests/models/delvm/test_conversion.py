"""Conversion of DeLVM between the shards of a training, the Hugging Face form and native names."""

import json
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.convert.convert_weight import main
from mindvlm.convert.parity.comparison import compare_logits
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.checkpoint_config import from_published, is_delvm, is_vit, read_published
from mindvlm.models.run_config import read_config
from tests.tiny_delvm import TRAINING, VIT, VQGAN, training_tensors, write_hf, write_training, write_vqgan

# config.json of internlm-7b
INTERNLM_TEXT = {
    "architectures": ["InternLMForCausalLM"],
    "model_type": "internlm",
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 103168,
}
PROJECTION = "model.embedding.embed_proj.weight"


def tensors_of(path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).data for name in checkpoint.infos}


def require_equal(found, expected, *, without=()):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if name not in without:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def divided(tensors: dict[str, np.ndarray], num_shards: int) -> list[dict[str, np.ndarray]]:
    """Returns tensor shards as the parallel layers of InternLM divide a model."""
    shards = [{} for _ in range(num_shards)]
    for name, array in tensors.items():
        for t, shard in enumerate(shards):
            if "Wqkv" in name:
                parts = array.reshape(3, num_shards, -1, *array.shape[1:])
                shard[name] = parts[:, t].reshape(-1, *array.shape[1:])
            elif name.endswith(("w1.weight", "w2.weight", "fc1.weight", "fc1.bias", "head.weight", PROJECTION)):
                shard[name] = np.split(array, num_shards)[t]
            elif name.endswith(("out_proj.weight", "w3.weight", "fc2.weight")):
                shard[name] = np.split(array, num_shards, 1)[t]
            elif not name.endswith(("out_proj.bias", "fc2.bias")) or t == 0:
                shard[name] = array
    return [{name: np.ascontiguousarray(array) for name, array in shard.items()} for shard in shards]


def staged(tensors: dict[str, np.ndarray], num_blocks: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Returns the pipeline stages of a model with numbers of blocks, numbered from 0 in every stage."""
    stages = [{} for _ in num_blocks]
    places = [(stage, block) for stage, count in enumerate(num_blocks) for block in range(count)]
    for name, array in tensors.items():
        if name.startswith("model.blocks."):
            number, _, rest = name.removeprefix("model.blocks.").partition(".")
            stage, block = places[int(number)]
            stages[stage][f"model.blocks.{block}.{rest}"] = array
        else:
            stages[0 if "embedding" in name else -1][name] = array
    return stages


def write_shards(folder, tensors, *, tp=1, pp=(2,), config=TRAINING):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for p, stage in enumerate(staged(tensors, pp)):
        for t, shard in enumerate(divided(stage, tp)):
            write_checkpoint(folder / f"model_tp{t}_pp{p}.pt", MemorySource(shard))
    return folder


@pytest.mark.parametrize("config", [TRAINING, VIT], ids=["gated", "vit"])
@pytest.mark.parametrize(("tp", "pp"), [(2, (2,)), (1, (1, 1)), (2, (1, 1))])
def test_shards_form_the_model_that_was_divided(tmp_path, config, tp, pp):
    tensors = training_tensors(config)
    folder = write_shards(tmp_path / "shards", tensors, tp=tp, pp=pp, config=config)
    require_equal(tensors_of(folder), tensors)
    if (tp, pp) == (2, (1, 1)):
        require_equal(tensors_of(folder / "model_tp1_pp0.pt"), tensors)


def test_shards_of_uneven_stages_form_a_model(tmp_path):
    config = {**TRAINING, "model": {**TRAINING["model"], "num_layers": 5, "num_attention_heads": 6}}
    tensors = training_tensors(config)
    require_equal(tensors_of(write_shards(tmp_path / "shards", tensors, tp=4, pp=(1, 3, 1), config=config)), tensors)


def test_shards_that_form_no_model_are_named(tmp_path):
    tensors = training_tensors()
    folder = write_shards(tmp_path / "a", tensors, tp=2, pp=(1, 1))
    (folder / "model_tp1_pp0.pt").unlink()
    with pytest.raises(UserError, match="holds 3 shards of a training but not model_tp1_pp0.pt; copy all shards"):
        open_checkpoint(folder)
    for name, change, message in (
        # the trainer's default: all rows in every shard
        (PROJECTION, lambda _: tensors[PROJECTION], "embed_proj.weight of shape .* is not defined"),
        ("model.blocks.0.mixer.rope", lambda _: tensors["model.norm.weight"], "mixer.rope of .* is not defined"),
        ("model.norm.weight", lambda array: array[1:], "model.norm.weight is in 2 of 2 tensor shards"),
        (PROJECTION, lambda _: np.zeros((), np.float32), r"embed_proj.weight of shape \[\] .* is not defined"),
        ("model.blocks.0.mlp.w3.weight", lambda _: np.zeros((0, 4), np.float32), "w3.weight .* is not defined"),
    ):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for t, shard in enumerate(divided(tensors, 2)):
            shard[name] = np.array(change(shard.get(name)), order="C")
            if name == "model.norm.weight" and t == 0:
                shard[name] = tensors[name]
            write_checkpoint(folder / f"model_tp{t}_pp0.pt", MemorySource(shard))
        with pytest.raises(UserError, match=message):
            open_checkpoint(folder)


def test_a_norm_that_the_first_shard_lacks_is_named(tmp_path):
    folder = write_shards(tmp_path / "a", tensors := training_tensors(), tp=2)
    shard = divided(tensors, 2)[0]
    del shard["model.blocks.0.norm1.weight"]
    write_checkpoint(folder / "model_tp0_pp0.pt", MemorySource(shard))
    with pytest.raises(UserError, match="blocks.0.norm1.weight is in 1 of 2 tensor shards"):
        open_checkpoint(folder)


def test_a_shard_that_is_there_twice_or_not_at_all_is_named(tmp_path):
    folder = write_shards(tmp_path / "a", training_tensors(), tp=2)
    with pytest.raises(UserError, match="model_tp2_pp0.pt"):
        open_checkpoint(folder / "model_tp2_pp0.pt")
    write_checkpoint(folder / "model_tp1_pp0.safetensors", MemorySource({"x": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match="model_tp1_pp0.pt and model_tp1_pp0.safetensors, the same shard twice"):
        open_checkpoint(folder)


def test_a_last_stage_that_is_missing_twice_or_first_is_named(tmp_path):
    """The files alone tell it, without a config."""
    folder = write_shards(tmp_path / "a", training_tensors(), pp=(1, 1))
    (folder / "config.json").unlink()
    first, last = folder / "model_tp0_pp0.pt", folder / "model_tp0_pp1.pt"
    (folder / "model_tp0_pp2.pt").write_bytes(last.read_bytes())
    with pytest.raises(UserError, match=r"model_tp0_pp2.pt: tensor model.\S+ is in an earlier stage too"):
        open_checkpoint(folder)
    (folder / "model_tp0_pp2.pt").rename(last)
    contents = first.read_bytes(), last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="model_tp0_pp0.pt: has no head.weight, which the last .* shards of all stages"):
        open_checkpoint(folder)
    for file, content in zip((last, first), contents, strict=True):
        file.write_bytes(content)
    with pytest.raises(UserError, match="model_tp0_pp1.pt: has no head.weight"):
        open_checkpoint(folder)


def test_the_file_of_a_vqgan_without_its_sizes_is_named(tmp_path):
    tensors = training_tensors()
    del tensors["model.embedding.vq_model.encoder.conv_in.weight"]
    folder = write_shards(tmp_path / "a", tensors, config={key: TRAINING[key] for key in ("model_type", "model")})
    with pytest.raises(UserError, match=r"/a\S*: the VQGAN lacks tensors by which its sizes are known"):
        read_published(folder)


def test_a_text_model_of_internlm_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM_TEXT))
    with pytest.raises(UserError, match="does not describe a decoder of DeLVM; give the folder of one, or a YAML"):
        read_config(tmp_path)


def test_blocks_that_a_stage_numbers_on_are_refused(tmp_path):
    tensors = training_tensors()
    folder = write_shards(tmp_path / "a", tensors, pp=(1, 1))
    second = {"model.blocks.1.norm1.weight": tensors["model.norm.weight"]}
    write_checkpoint(folder / "model_tp0_pp1.pt", MemorySource(second))
    with pytest.raises(UserError, match="model_tp0_pp1.pt: has the blocks 1 to 1, 1 in all; expected 0 to 0"):
        open_checkpoint(folder)


def test_pickled_settings_are_read_without_their_class(tmp_path, monkeypatch):
    module = types.ModuleType("internlm.core.context.parallel_context")
    module.Config = type("Config", (dict,), {"__module__": module.__name__})
    for name in ("internlm", "internlm.core", "internlm.core.context"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = write_training(tmp_path / "training")
    (folder / "config.json").unlink()
    settings = module.Config({**TRAINING["model"], "dtype": torch.float16, "lvm_config": module.Config(enable=True)})
    torch.save(settings, folder / "model_config.pt")
    monkeypatch.undo()
    found = read_published(folder)
    assert found["model"] == {**TRAINING["model"], "dtype": "torch.float16", "lvm_config": {"enable": True}}
    # the tensors do not tell the resolution of the VQGAN
    expected = from_published({**TRAINING, "vq_config": {**TRAINING["vq_config"], "resolution": 256}})
    assert from_published(found) == expected
    assert read_config(folder).model == expected
    assert convert(ConversionRequest(sources=(folder,), target=tmp_path / "hf", to="hf", verify="tensors")).verified
    torch.save({"a": print}, folder / "model_config.pt")
    read_published(folder)
    torch.save(EvilConfig(), folder / "model_config.pt")
    with pytest.raises(UserError, match=r"model_config.pt: refused, it .*system"):
        read_published(folder)


def test_settings_that_contain_themselves_are_refused(tmp_path):
    settings = {}
    settings["a"] = settings
    torch.save(settings, tmp_path / "model_config.pt")
    with pytest.raises(UserError, match="model_config.pt: .* more than 16 deep"):
        read_published(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": 5},
        {"architectures": [[]], "hidden_size": 8},
        {"model_type": [], "hidden_size": 8},
        INTERNLM_TEXT,
    ],
)
def test_configs_of_other_models_are_not_claimed(config):
    assert not is_delvm(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "internlm", "hidden_size": 8, "model": 3}, "model is 3, expected a table"),
        (TRAINING | {"model": TRAINING["model"] | {"num_attention_heads": 5}}, "24, which 5 attention heads do not"),
        (
            TRAINING | {"model": TRAINING["model"] | {"norm_type": "x"}},
            "norm_type is 'x', expected one of rmsnorm, lay",
        ),
        (VQGAN | {"num_res_blocks": 10**9}, "num_res_blocks is 1000000000 .* expected at most 100"),
    ],
)
def test_bad_configs_are_refused(config, message):
    assert is_delvm(config) and not is_vit(config)
    with pytest.raises(UserError, match=message):
        from_published(config)


class EvilConfig(dict):
    def __reduce__(self):
        import os

        return os.system, ("true",)


@pytest.mark.parametrize("config", [TRAINING, VIT], ids=["gated", "vit"])
def test_both_forms_convert_into_each_other(tmp_path, config, capsys):
    tensors = training_tensors(config)
    training = write_training(tmp_path / "training", config)
    native, back = tmp_path / "native.safetensors", tmp_path / "back.pt"
    convert(ConversionRequest(sources=(training,), target=native, verify="tensors"))
    convert(ConversionRequest(sources=(native,), target=back, to="internlm", verify="tensors"))
    require_equal(tensors_of(back), tensors)
    hf = write_hf(tmp_path / "hf", training)
    written = tensors_of(hf)
    table = tensors["model.embedding.vq_model.quantize.embedding.weight"] @ tensors[PROJECTION].T
    np.testing.assert_allclose(written["model.embed_tokens.weight"], table, rtol=1e-5, atol=1e-6)
    vqgan = write_vqgan(tmp_path / "vqgan", tensors)
    recovered, report = tmp_path / "recovered.safetensors", tmp_path / "report.json"
    command = ["--torch_ckpt_path", str(hf), str(vqgan), "--mindspore_ckpt_path", str(recovered), "--to", "internlm"]
    assert main([*command, "--verify", "--report", str(report)]) == 0
    assert "by the pseudo-inverse of the codebook, relative residual" in capsys.readouterr().out
    record = json.loads(report.read_text())
    assert 0 < record["options"]["form"]["residual"] < 1e-6
    origin = {one["name"]: one["origin"] for one in record["tensors"]}[PROJECTION]
    assert [one["names"] for one in origin] == [["model.embed_tokens.weight"], ["quantize.embedding.weight"]]
    found = tensors_of(recovered)
    require_equal(found, tensors, without=[PROJECTION])
    np.testing.assert_allclose(found[PROJECTION], tensors[PROJECTION], rtol=1e-3, atol=1e-5)
    # a folder gets the config of its form, with what only the config.json of the VQGAN tells, such as the resolution
    capsys.readouterr()
    command = ["--torch_ckpt_path", str(hf), str(vqgan), "--mindspore_ckpt_path", str(tmp_path / "folder")]
    assert main([*command, "--to", "internlm"]) == 0
    assert "no config.json" not in capsys.readouterr().out
    described = from_published(read_published(tmp_path / "folder"))
    expected = from_published(config)
    assert described.language_model == expected.language_model if config is TRAINING else described.vqgan
    assert described.input_embedding == "codebook" and described.vqgan == expected.vqgan


def test_the_roles_of_the_mlp_are_those_of_the_training(tmp_path):
    """w1 is the gate, w2 goes up, w3 goes down."""
    tensors = training_tensors()
    written = tensors_of(write_hf(tmp_path / "hf", write_training(tmp_path / "training")))
    for name, role in (("w1", "gate"), ("w2", "up"), ("w3", "down")):
        expected = tensors[f"model.blocks.1.mlp.{name}.weight"]
        np.testing.assert_array_equal(written[f"model.layers.1.mlp.{role}_proj.weight"], expected)


def test_a_codebook_that_does_not_explain_the_table_is_refused(tmp_path):
    hf = write_hf(tmp_path / "hf", write_training(tmp_path / "training"))
    other = write_vqgan(tmp_path / "other", training_tensors(seed=1))
    request = ConversionRequest(sources=(hf, other), target=tmp_path / "x.pt", to="internlm")
    with pytest.raises(UserError, match=r"does not explain the token embeddings \(relative residual .* trained with"):
        convert(request)
    with pytest.raises(UserError, match="the VQGAN is missing, whose codebook .* give its folder as a further source"):
        convert(ConversionRequest(sources=(hf,), target=tmp_path / "x.pt", to="internlm"))
    assert not (tmp_path / "x.pt").exists()


def parity(source, target, config, **changes):
    request = ParityRequest(family="delvm", model="delvm_vit" if config is VIT else "delvm",
                            source_paths=[str(source)], target=str(target), config=config, num_tokens=4)  # fmt: skip
    return compare_logits(request)


@pytest.mark.parametrize("config", [TRAINING, VIT], ids=["gated", "vit"])
def test_the_logits_check_runs_the_training_form(tmp_path, config):
    training, target = write_training(tmp_path / "training", config), tmp_path / "target.safetensors"
    convert(ConversionRequest(sources=(training,), target=target))
    report = parity(training, target, config)
    assert report.passed, report.table()
    assert [stage.key for stage in report.stages][:3] == ["latent", "decoded", "merged_embeddings"]
    if config is TRAINING:
        tensors = tensors_of(target)
        place = "language_model.layers.1.mlp."
        gate, up = f"{place}gate_proj.weight", f"{place}up_proj.weight"
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
        write_checkpoint(target, MemorySource(tensors))
        assert "stage decoder layers is wrong" in parity(training, target, config).failure()


@pytest.mark.parametrize("is_alone", [True, False], ids=["VQGAN", "training"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_vqgan_without_config_must_be_whole(tmp_path, change, is_alone):
    """No file tells which tensors it has; the sizes of some do."""
    tensors, prefix = training_tensors(), "model.embedding.vq_model."
    place = "decoder.up.0.block.0.norm1.weight"
    if change == "missing":
        del tensors[prefix + place]
    else:
        place = "encoder.down.7.x" if change == "unexpected" else place
        tensors[prefix + place] = np.ones(5, np.float32)
    if is_alone:
        vqgan = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        write_checkpoint(tmp_path / "pytorch_model.bin", MemorySource(vqgan))
    else:
        write_checkpoint(tmp_path / "model_tp0_pp0.pt", MemorySource(tensors))
    with pytest.raises(UserError, match=f"1 {change}; first: {change} vqgan.{place}"):
        convert(ConversionRequest(sources=(tmp_path,), target=tmp_path / "native.safetensors"))
    assert not (tmp_path / "native.safetensors").exists()
