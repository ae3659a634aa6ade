"""Names, shapes and totals of the published models, and the way to native names and back."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.convert.convert_weight import main as convert
from mindvlm.models.slime import released
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import HF, STATISTICS, infos_of
from mindvlm.weights.recognise import detect_model
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import ALL
from tests.models.tinyllava.test_separate_tower import parameters
from tests.tiny_slime import CONFIG, TOWER, hf_tensors, write_tiny_slime

PROJECTOR, SAMPLER = "model.mm_projector.", "model.sampler.post_qformer."
TOWER_PREFIX = "model.vision_tower.vision_tower."
TOTALS = {
    "vicuna_7b": (714, 7_072_790_530),
    "llama3_8b": (714, 8_364_636_162),
    "vicuna_13b": (786, 13_360_727_042),
    "llama3_70b": (1146, 70_942_615_554),
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    infos = infos_of(from_hf_config(getattr(released, f"{name}_config")()))
    published = dict(make_plan(HF.reverse(), infos).infos)
    published |= {f"{PROJECTOR}{buffer}": TensorInfo(buffer, "float32", (1,)) for buffer in STATISTICS}
    assert (len(published), sum(info.num_elements for info in published.values())) == TOTALS[name]
    of = {prefix: [info for n, info in published.items() if n.startswith(prefix)] for prefix in (PROJECTOR, SAMPLER)}
    assert (len(of[PROJECTOR]), len(of[SAMPLER])) == (20, 12)
    mlp = {"vicuna_7b": 20_979_712, "llama3_8b": 20_979_712, "vicuna_13b": 31_467_520, "llama3_70b": 75_513_856}[name]
    sizes = {prefix: sum(info.num_elements for info in found) for prefix, found in of.items()}
    assert sizes == {PROJECTOR: mlp + 5_384_192 + 4_098, SAMPLER: 4_499_456}


def test_round_trip(tmp_path):
    folder = write_tiny_slime(tmp_path)
    native, back = tmp_path / "native.safetensors", tmp_path / "back"
    assert convert(["--torch_ckpt_path", str(folder), "--mindspore_ckpt_path", str(native), "--verify"]) == 0
    with open_checkpoint(native) as checkpoint:
        assert checkpoint.infos.keys() == infos_of(from_hf_config(CONFIG, vision_config=TOWER)).keys()
    assert convert(["--torch_ckpt_path", str(native), "--mindspore_ckpt_path", str(back), "--to", "hf"]) == 0
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_shared_parts_are_those_of_other_models():
    tensors = hf_tensors()
    decoder = {n: v for n, v in tensors.items() if not n.startswith((PROJECTOR, SAMPLER, "model.vision_tower"))}
    infos = {name: TensorInfo(name, "float32", value.shape) for name, value in tensors.items()}
    assert detect_model(ALL, infos).name == "slime"
    whole = detect_model(ALL, {name: infos[name] for name in decoder})
    assert whole.name != "slime" and whole.native.parts[0].name == "language model"


def test_a_part_is_whole_or_absent(tmp_path):
    folder = write_tiny_slime(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{SAMPLER}ln_q.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert convert(["--torch_ckpt_path", str(folder), "--mindspore_ckpt_path", str(tmp_path / "n.safetensors")]) == 2


def split(tmp_path) -> dict[str, str]:
    """Writes the parts of the tiny model to files of their own; returns part -> path."""
    tensors = hf_tensors()
    names = {"projector": PROJECTOR, "sampler": SAMPLER, "tower": TOWER_PREFIX}
    parts = {key: {n: v for n, v in tensors.items() if n.startswith(prefix)} for key, prefix in names.items()}
    parts["decoder"] = {n: v for n, v in tensors.items() if not n.startswith(tuple(names.values()))}
    parts["tower"] = {n.removeprefix(TOWER_PREFIX): v for n, v in parts["tower"].items()}
    for buffer in STATISTICS:
        del parts["projector"][PROJECTOR + buffer]
    for key, values in parts.items():
        torch.save({name: torch.tensor(value) for name, value in values.items()}, tmp_path / f"{key}.bin")
    assert (len(parts["projector"]), len(parts["sampler"])) == (18, 12)
    return {key: str(tmp_path / f"{key}.bin") for key in parts}


def test_the_files_that_the_stages_leave_complete_a_decoder_and_a_tower(tmp_path):
    files, folder = split(tmp_path), write_tiny_slime(tmp_path)
    joined, whole = tmp_path / "joined.safetensors", tmp_path / "whole.safetensors"
    assert convert(["--torch_ckpt_path", *files.values(), "--mindspore_ckpt_path", str(joined)]) == 0
    assert convert(["--torch_ckpt_path", str(folder), "--mindspore_ckpt_path", str(whole)]) == 0
    ours, theirs = load_file(joined), load_file(whole)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_an_adapter_for_the_decoder_and_the_adapters_of_images_make_a_model(tmp_path):
    """As the 70B model is published."""
    files, lora, target = split(tmp_path), tmp_path / "lora", tmp_path / "merged.safetensors"
    rng, factors = np.random.default_rng(3), {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        factors[f"{name}.lora_A.weight"] = rng.normal(size=(4, 32)).astype(np.float32)
        factors[f"{name}.lora_B.weight"] = rng.normal(size=(48, 4)).astype(np.float32)
    lora.mkdir()
    save_file(factors, lora / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "bias": "none"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    trained = {n: v for n, v in hf_tensors().items() if n.startswith((PROJECTOR, SAMPLER))}
    fixed = ("pos_embed", ".mean", ".std")
    beside = {f"base_model.model.{n}": torch.tensor(v) for n, v in trained.items() if not n.endswith(fixed)}
    torch.save(beside, lora / "non_lora_trainables.bin")
    sources = [files["decoder"], files["tower"], str(lora / "non_lora_trainables.bin")]
    options = ["--merge_lora", str(lora), "--mindspore_ckpt_path", str(target)]
    assert convert(["--torch_ckpt_path", *sources, *options]) == 0
    folder, values = write_tiny_slime(tmp_path), load_file(target)
    loaded = parameters(folder, checkpoint=str(target), cache=False)
    assert loaded.keys() - values.keys() == {"mm_projector.attn.pos_embed", "sampler.pos_embed"}
    assert all((loaded[name] == value).all() for name, value in values.items())
    name = "layers.1.mlp.up_proj"
    low, high = (factors[f"base_model.model.model.{name}.lora_{which}.weight"] for which in "AB")
    merged = hf_tensors()[f"model.{name}.weight"] + 2 * high @ low
    np.testing.assert_allclose(values[f"language_model.{name}.weight"], merged, rtol=1e-5, atol=1e-5)
