"""`mindvlm-convert --quant`: the file, its proof, what runs it and what refuses it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mindvlm
from mindvlm.checkpoint import MemorySource, RawTensor, open_checkpoint, write_checkpoint, write_safetensors
from mindvlm.convert import convert_weight
from mindvlm.convert.calibration import measure_importance
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import PARTS, PATTERNS, part_of
from mindvlm.models.loading import build_model
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.nn.linear import Head, WeightCell
from mindvlm.nn.native_products import NativeProduct
from mindvlm.nn.parameters import stored_tensors
from mindvlm.tools import check_model
from mindvlm.training.initial_weights import identify_weights
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import picture, tiny_config, tiny_weights, write_tiny_vary, write_yaml

pytestmark = pytest.mark.usefixtures("kernels")

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = (
    "vary/vary_toy vary/vary_tiny vary/vary_nano tinyllava/tinyllava_3_1b tinyllava/tinyllava_2_0b "
    "tinyllava/tiny_llava_v1 slime/slime_8b slime/slime_small delvm/delvm_300m delvm/scenes"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The YAML of a tiny model, beside its weights in float32."""
    return write_tiny_vary(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def quantized(tiny) -> Path:
    """Its weights in int4 with a head in int8."""
    target = tiny.with_name("int4.safetensors")
    assert run("--torch_ckpt_path", tiny.with_name("tiny.safetensors"), "--target", target, "--quant", "int4") == 0
    return target


def run(*arguments) -> int:
    return convert_weight.main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    return error


def held_rows(path: Path, **overrides) -> dict[str, np.ndarray]:
    """The weights that a loaded model computes with."""
    found = {}
    for name, target in stored_tensors(mindvlm.load(path, **overrides).model).items():
        if isinstance(target, NativeProduct):
            found[name] = np.stack([target.stored.row(index) for index in range(target.shape[0])])
        else:
            found[name] = getattr(target, "weight", target).asnumpy()
    return found


def dtypes_of(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as checkpoint:
        return {name: info.dtype for name, info in checkpoint.infos.items()}


@pytest.mark.parametrize("model", MODELS.split())
def test_the_matrices_of_a_file_are_those_of_the_cells(model):
    config = read_config(CONFIGS / f"{model}.yaml")
    cells = build_model(get_family(config.family), config.model)[0]
    products = {
        f"{name}.weight": next((part for part in PATTERNS if re.fullmatch(PATTERNS[part], name)), None)
        for name, cell in cells.cells_and_names()
        if isinstance(cell, WeightCell)
    }
    named = {name: part_of(name, tuple(target.shape)) for name, target in stored_tensors(cells).items()}
    assert {name: part for name, part in named.items() if part} == {n: p for n, p in products.items() if p}
    assert set(filter(None, named.values())) >= {"decoder"} and set(PATTERNS) == set(PARTS)


@pytest.mark.parametrize("weights", ["int4", "int8", "int8c", "int4,head=16bit,towers=int8,embeddings=int4"])
def test_a_quantized_file_is_what_the_key_weights_makes_of_the_source(tiny, tmp_path, weights, capsys):
    target = tmp_path / "quantized.safetensors"
    source = tiny.with_name("tiny.safetensors")
    assert run("--torch_ckpt_path", source, "--target", target, "--quant", weights, "--verify") == 0
    assert "matrices are within the bounds of their formats" in capsys.readouterr().out
    expected, found = held_rows(tiny, weights=weights), held_rows(tiny, checkpoint=str(target))
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert target.stat().st_size < 0.7 * source.stat().st_size


def test_a_published_folder_becomes_a_folder_that_answers_alike(tmp_path):
    folder, target, weights = tmp_path / "source", tmp_path / "target", "int8,towers=int8,embeddings=int8"
    folder.mkdir()
    folder = write_tiny_tinyllava(folder)
    assert run("--torch_ckpt_path", folder, "--target", target, "--quant", weights, "--verify") == 0
    options = {"mode": "pynative", "device": "cpu", "cache": False}
    models = mindvlm.load(folder, weights=weights, **options), mindvlm.load(target, **options)
    expected, found = (model.logits("What is it?", picture()) for model in models)
    np.testing.assert_array_equal(found, expected)


def test_a_file_in_int4k(tmp_path):
    sizes = {"model__language_model__hidden_size": 256, "model__language_model__head_dim": 128}
    yaml = write_tiny_vary(tmp_path, **sizes)
    target = tmp_path / "q.safetensors"
    options = ("--target", target, "--quant", "int4k", "--verify")
    assert run("--torch_ckpt_path", tmp_path / "tiny.safetensors", *options) == 0
    dtypes = dtypes_of(target)
    assert dtypes["language_model.layers.0.mlp.up_proj.weight"] == "q4_K"
    assert dtypes["language_model.layers.0.mlp.down_proj.weight"] == "float16"
    found = held_rows(yaml, checkpoint=str(target))
    for name, values in held_rows(yaml, weights="int4k").items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_widths_that_are_no_multiple_of_the_block_keep_16_bits(tiny, tmp_path, capsys):
    target = tmp_path / "quantized.safetensors"
    assert run("--torch_ckpt_path", tiny.with_name("tiny.safetensors"), "--target", target, "--quant", "int4") == 0
    printed = capsys.readouterr().out
    assert "16 bits where the width is no multiple of 32: language_model.layers.{}.mlp.down_proj.weight" in printed
    dtypes = dtypes_of(target)
    assert dtypes["language_model.layers.0.mlp.down_proj.weight"] == "float16"
    assert dtypes["language_model.layers.0.mlp.up_proj.weight"] == "q4_0"
    assert dtypes["language_model.lm_head.weight"] == "q8_0"
    assert dtypes["language_model.norm.weight"] == "float32"


def test_values_beyond_float16_become_bfloat16(tmp_path):
    config = tiny_config()
    weights = tiny_weights(config)
    weights["language_model.embed_tokens.weight"][3, 5] = 1e5
    yaml = write_tiny_vary(tmp_path, weights=weights)
    assert run("--torch_ckpt_path", tmp_path / "tiny.safetensors", "--target", tmp_path / "q", "--quant", "int8") == 0
    assert dtypes_of(tmp_path / "q")["language_model.embed_tokens.weight"] == "bfloat16"
    rows = held_rows(yaml, checkpoint=str(tmp_path / "q" / "model.safetensors"))
    assert rows["language_model.embed_tokens.weight"][3, 5] == 99840


def test_shards_give_the_file_of_the_whole(tiny, quantized, tmp_path):
    source = tiny.with_name("tiny.safetensors")
    assert run("--torch_ckpt_path", source, "--target", tmp_path / "sharded", "--max_shard_size", "20KB") == 0
    options = ("--quant", "int4", "--max_shard_size", "10KB", "--verify")
    assert run("--torch_ckpt_path", tmp_path / "sharded", "--target", tmp_path / "int4", *options) == 0
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) > 3
    with open_checkpoint(tmp_path / "int4") as shards, open_checkpoint(quantized) as whole:
        assert shards.infos.keys() == whole.infos.keys()
        for name, info in whole.infos.items():
            assert shards.infos[name] == info
            assert shards.read(name).data.tobytes() == whole.read(name).data.tobytes()


def test_the_report_has_the_error_of_each_matrix(tiny, tmp_path):
    report = tmp_path / "report.json"
    options = ("--quant", "int8", "--verify", "--report", report)
    assert run("--torch_ckpt_path", tiny.with_name("tiny.safetensors"), "--target", tmp_path / "q", *options) == 0
    record = json.loads(report.read_text())
    errors = record["verification"]["relative_errors"]
    assert errors.keys() == {name for name, dtype in dtypes_of(tmp_path / "q").items() if dtype == "q8_0"}
    assert all(0.003 < error < 0.01 for error in errors.values())
    tensor = next(one for one in record["tensors"] if one["name"] == "language_model.lm_head.weight")
    assert tensor["dtype"] == "q8_0" and tensor["statistics"]["norm"] > 0


def test_a_file_in_int8c(tiny, tmp_path, capsys):
    """A float32 scale, then the int8 values of a row; one wrong value of a long row is found."""
    source, target = tiny.with_name("tiny.safetensors"), tmp_path / "q.safetensors"
    options = ("--torch_ckpt_path", source, "--target", target, "--quant", "int8c")
    assert run(*options, "--verify") == 0
    name = "language_model.layers.0.mlp.up_proj.weight"
    with open_checkpoint(source) as exact, open_checkpoint(target) as checkpoint:
        wanted, raw = exact.read(name).to_float32(), checkpoint.read(name)
        tensors = {other: checkpoint.read(other) for other in checkpoint.infos}
    width = wanted.shape[1]
    assert raw.dtype == f"q8_c[{width}]"
    bits = np.frombuffer(bytearray(raw.data.tobytes()), np.uint8).reshape(len(wanted), 4 + width)
    scales = np.abs(wanted).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_allclose(bits[:, :4].copy().view("<f4"), scales, rtol=1e-7)
    np.testing.assert_array_equal(bits[:, 4:].view(np.int8), np.rint(wanted / scales))
    capsys.readouterr()
    assert run("--inspect", target) == 0
    assert f"q8_c[{width}]" in capsys.readouterr().out
    bits[1, 9] ^= 2
    tensors[name] = RawTensor(raw.dtype, raw.shape, bits.view(raw.data.dtype)[:, 0].reshape(raw.data.shape))
    write_safetensors(target, MemorySource(tensors))
    assert f"{name} in q8_c[{width}] differs from the source by more than 0.4% in row 1" in fails(
        capsys, *options, "--verify_only"
    )


@pytest.mark.parametrize("harm", ["scale", "nibbles", "norm"])
def test_verification_finds_a_wrong_value(tiny, quantized, tmp_path, harm, capsys):
    with open_checkpoint(quantized) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.infos}
    name = "language_model.norm.weight" if harm == "norm" else "language_model.layers.1.mlp.up_proj.weight"
    raw = tensors[name]
    bits = np.frombuffer(bytearray(raw.data.tobytes()), np.uint8)
    if harm == "nibbles":
        bits[2:18] = bits[2:18] << 4 | bits[2:18] >> 4
    else:
        bits[1] ^= 0x40
    tensors[name] = RawTensor(raw.dtype, raw.shape, bits.view(raw.data.dtype).reshape(raw.data.shape))
    write_safetensors(tmp_path / "wrong.safetensors", MemorySource(tensors))
    source = tiny.with_name("tiny.safetensors")
    options = ("--target", tmp_path / "wrong.safetensors", "--quant", "int4", "--verify_only")
    error = fails(capsys, "--torch_ckpt_path", source, *options)
    assert f"verification failed, {'tensor ' if harm == 'norm' else ''}{name}" in error
    assert harm == "norm" or "in row 0 from column 0 on" in error


@pytest.mark.parametrize("weights", ["int8", "int8c"])
def test_a_block_near_zero_passes_the_proof(tmp_path, weights):
    tensors = tiny_weights(tiny_config())
    tensors["language_model.layers.0.mlp.up_proj.weight"][:4] = [[3e-7], [1e-9], [0], [1e-38]]
    write_tiny_vary(tmp_path, weights=tensors)
    options = ("--target", tmp_path / "q", "--quant", weights, "--verify")
    assert run("--torch_ckpt_path", tmp_path / "tiny.safetensors", *options) == 0


def test_options_that_do_not_go_with_it(tiny, tmp_path, capsys):
    source = ("--torch_ckpt_path", tiny.with_name("tiny.safetensors"), "--quant")
    for options, message in (
        (("int4", "--to", "hf", "--target", tmp_path / "o"), "--to hf has no quantized weights"),
        (("int4", "--dtype", "float16"), "--dtype float16 does not go with --quant"),
        (("int4", "--verify", "logits"), "use --verify tensors"),
        (("int4", "--target", tmp_path / "o.ckpt"), "written as .safetensors"),
        (("int5",), "--quant is 'int5'; expected one of"),
        (("16bit",), "--quant 16bit quantizes nothing"),
        (("int4", "--calibrate", tmp_path, "--config_path", tiny), "holds no pictures"),
        (("int4", "--calibrate", tmp_path), "does not describe; add --config_path YAML"),
    ):
        assert message in fails(capsys, *source, *options)
    assert not list(tmp_path.iterdir())


def test_calibration_weighs_columns_by_their_activations(tiny, quantized, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for seed in range(2):
        picture(seed).save(tmp_path / "pictures" / f"{seed}.png")
    source, target = tiny.with_name("tiny.safetensors"), tmp_path / "calibrated.safetensors"
    options = ("--calibrate", tmp_path / "pictures", "--config_path", tiny, "--verify")
    assert run("--torch_ckpt_path", source, "--target", target, "--quant", "int4", *options) == 0
    assert "--calibrate weighs the errors of quantized" in fails(capsys, "--torch_ckpt_path", source, *options)
    importance = measure_importance(tiny, [source], tmp_path / "pictures")
    better = 0
    with open_checkpoint(source) as exact, open_checkpoint(quantized) as plain, open_checkpoint(target) as weighted:
        blocks = [name for name, info in weighted.infos.items() if info.dtype == "q4_0"]
        for name in blocks:
            weights, values = importance[name], exact.read(name).data
            errors = [(weights * (one.read(name).to_float32() - values) ** 2).sum() for one in (plain, weighted)]
            assert errors[1] <= errors[0] * 1.0001, name
            better += errors[1] < errors[0] * 0.99
    assert better > len(blocks) / 2
    assert run("--torch_ckpt_path", source, "--target", target, "--quant", "int4", "--verify_only") == 0


def test_importance_is_the_mean_square_of_the_inputs(tiny, tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    seen = []
    construct = Head.construct
    monkeypatch.setattr(Head, "construct", lambda self, x: (seen.append(x.asnumpy()), construct(self, x))[1])
    importance = measure_importance(tiny, [tiny.with_name("tiny.safetensors")], tmp_path)
    rows = np.concatenate([one.reshape(-1, one.shape[-1]) for one in seen]).astype(np.float64)
    squares = (rows**2).mean(0)
    expected = np.maximum(squares / squares.mean(), 1e-3)
    np.testing.assert_allclose(importance["language_model.lm_head.weight"], expected, rtol=1e-5)


def test_the_default_target_is_named_after_the_formats(tiny, tmp_path):
    write_tiny_vary(tmp_path)
    assert run("--torch_ckpt_path", tmp_path / "tiny.safetensors", "--quant", "int4,towers=int8") == 0
    assert (tmp_path / "vary_toy-int4-towers-int8.safetensors").is_file()


def test_a_matrix_with_nan_is_refused_and_nothing_is_left(tmp_path, capsys):
    weights = tiny_weights(tiny_config())
    weights["language_model.lm_head.weight"][1, 2] = np.nan
    write_tiny_vary(tmp_path, weights=weights)
    options = ("--torch_ckpt_path", tmp_path / "tiny.safetensors", "--target", tmp_path / "q", "--quant", "int4")
    assert "language_model.lm_head.weight holds NaN or infinity" in fails(capsys, *options)
    assert not (tmp_path / "q").exists()


def test_a_quantized_file_is_neither_converted_nor_trained(quantized, tmp_path, capsys):
    error = fails(capsys, "--torch_ckpt_path", quantized, "--to", "hf", "--target", tmp_path / "hf")
    assert "can be run but not converted or trained; give the weights that they were made from" in error
    with pytest.raises(UserError, match=r"int4.safetensors: weights quantized by mindvlm-convert .*q4_0"):
        identify_weights([str(quantized)])


def test_the_key_weights_over_a_quantized_file(tiny, quantized):
    with pytest.raises(UserError, match="weights is 'int8' but .*int4.safetensors holds .* in q4_0"):
        mindvlm.load(tiny, checkpoint=str(quantized), weights="int8")
    stored = held_rows(tiny, checkpoint=str(quantized))
    for weights, tolerance in (("int4", 0), ("float32", 0), ("16bit", 1e-3)):
        for name, values in held_rows(tiny, checkpoint=str(quantized), weights=weights).items():
            np.testing.assert_allclose(values, stored[name], rtol=tolerance, atol=0, err_msg=name)


def test_a_quantized_file_runs_without_the_kernels(tiny, quantized, monkeypatch):
    stored = held_rows(tiny, checkpoint=str(quantized))
    monkeypatch.setattr("mindvlm.nn.native_products.open_library", lambda: None)
    for name, values in held_rows(tiny, checkpoint=str(quantized)).items():
        np.testing.assert_array_equal(values, stored[name], err_msg=name)


def test_the_check_says_that_blocks_are_widened_without_loss(tiny, quantized, tmp_path, capsys):
    config = tiny_config(checkpoint=str(quantized))
    config["processor"]["vocab_file"] = str(tiny.with_name("small.tiktoken"))
    assert check_model.main(["--config_path", str(write_yaml(tmp_path, config))]) == 0
    assert re.search("stored .*q4_0 .*, computed in float32: widened without loss", capsys.readouterr().out)


def test_a_file_of_another_model_names_the_config(quantized, tmp_path):
    other = write_tiny_vary(tmp_path, model__language_model__num_hidden_layers=1)
    with pytest.raises(UserError, match="correct the sizes in .*tiny.yaml"):
        mindvlm.load(other, checkpoint=str(quantized))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "its quantization has version 2, readable is 1"),
        ({"format": "q3_x"}, "has the format 'q3_x', readable are q8_0, q8_c, q4_0"),
        ({"block": 16}, "has no valid shape and block"),
        ({"shape": [4, 33]}, "has no valid shape and block"),
        ({"format": "q8_c"}, "is uint8 .4, 18., not q8_c.32. of shape .4, 32."),
        ({"format": "q8_c", "block": 64}, "has no valid shape and block"),
        ({"format": "q8_c", "block": "x", "shape": [4, "x"]}, "has no valid shape and block"),
        ({"format": "q8_c", "block": 0, "shape": [4, 0]}, "has no valid shape and block"),
        ({"format": "q8_c", "block": 1 << 40, "shape": [4, 1 << 40]}, "has no valid shape and block"),
        ({"shape": [4, 64]}, "is uint8 .4, 18., not q4_0 of shape .4, 64."),
    ],
)
def test_a_damaged_description_is_named(tmp_path, change, message):
    blocks = np.zeros((4, 1), "V18")
    write_checkpoint(tmp_path / "a.safetensors", MemorySource({"a": RawTensor("q4_0", (4, 32), blocks)}))
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    table = json.loads(header["__metadata__"]["mindvlm_quantization"])
    (table if "version" in change else table["tensors"]["a"]).update(change)
    header["__metadata__"]["mindvlm_quantization"] = json.dumps(table)
    encoded = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "a.safetensors")
