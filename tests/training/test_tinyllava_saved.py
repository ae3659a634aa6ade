"""Files of a TinyLLaVA training: folders that load and resume, files under published names, adapters."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import mindvlm
from mindvlm.api import VisionLanguageModel
from mindvlm.checkpoint import open_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.config import Scope
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from tests.models.tinyllava.test_factory_folder import write_factory_folder
from tests.tiny_tinyllava import TOWER, hf_config, write_tiny_tinyllava
from tests.tiny_vary import picture
from tests.training.small_job import losses
from tests.training.test_tinyllava_job import SHARE, built, llava_job, train


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).to_float32() for name in checkpoint.infos}


def test_a_run_goes_on_and_its_checkpoint_is_a_model_folder(tmp_path):
    options = dict(schedule__total_steps=4, save_every=2, model_changes=SHARE)
    whole = train(llava_job(tmp_path, output_dir=str(tmp_path / "whole"), keep_checkpoints=4, **options))
    parts = tmp_path / "whole" / "step-4"
    parts.rename(tmp_path / "aside")
    train(llava_job(tmp_path, output_dir=str(tmp_path / "whole"), keep_checkpoints=4, **options))
    for name, value in read_all(tmp_path / "aside" / "weights.safetensors").items():
        np.testing.assert_array_equal(read_all(parts / "weights.safetensors")[name], value, err_msg=name)
    assert len(losses(tmp_path / "whole")) == 4 and whole.step == 4

    convert(
        ConversionRequest(sources=(parts / "weights.safetensors",), target=tmp_path / "hf", to="hf", verify="tensors")
    )
    start, end = read_all(tmp_path / "model"), read_all(tmp_path / "hf")
    assert {name: array.shape for name, array in start.items()} == {name: array.shape for name, array in end.items()}
    prefix = "model.vision_tower.vision_tower.vision_model.encoder.layers."
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    assert f"{prefix}1.mlp.fc1.weight" in moved and "model.mm_projector.0.weight" in moved
    assert not any(name.startswith(f"{prefix}0.") for name in moved)
    answers = [
        mindvlm.load(folder, device="cpu", mode="pynative").chat("What?", picture(), max_new_tokens=3).ids
        for folder in (parts, tmp_path / "hf")
    ]
    assert answers[0] == answers[1]

    target = tmp_path / "connector.safetensors"
    convert(ConversionRequest(sources=(parts / "weights.safetensors",), target=target, to="hf", only="projectors"))
    connector = read_all(tmp_path / "connector.safetensors")
    assert set(connector) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    again = llava_job(
        tmp_path, init={"weights": ["model", "connector.safetensors"]}, output_dir=str(tmp_path / "again")
    )
    parameters = dict(built(again)[0].parameters_and_names())
    np.testing.assert_array_equal(parameters["mm_projector.0.weight"].asnumpy(), end["model.mm_projector.0.weight"])


@pytest.mark.parametrize("dialect", ["llama", "phi", "stablelm"])
def test_config_json_is_written_as_it_was_read(tmp_path, dialect):
    config = mindvlm.api.read_config(write_tiny_tinyllava(tmp_path, dialect=dialect, max_position_embeddings=300))
    written = read_again(config, tmp_path / "again")
    expected = hf_config(dialect, max_position_embeddings=300)
    assert {key: written[key] for key in expected} == expected


@pytest.mark.parametrize("dialect", ["llama", "phi", "stablelm"])
def test_the_config_json_of_a_factory_model(tmp_path, dialect):
    """TinyLLaVABench has no keys for it: another feature of SigLIP, and a head with a bias."""
    write_factory_folder(tmp_path / "model", dialect)
    source = json.loads((tmp_path / "model/config.json").read_text()) | {"vision_model_name_or_path": "google/siglip"}
    (tmp_path / "model/config.json").write_text(json.dumps(source))
    written = read_again(mindvlm.api.read_config(tmp_path / "model"), tmp_path / "again")
    same = ("architectures", "model_type", "connector_type", "vision_feature_layer", "vision_model_name_or_path")
    assert [written[key] for key in same] == [source[key] for key in same]
    assert {key: written["vision_config"][key] for key in TOWER} == TOWER
    assert written["text_config"]["model_type"] == source["text_config"]["model_type"]


@pytest.mark.parametrize("changes", [{"template": "llava_hf"}, {"template": "v1", "system": "Be short."}])
def test_a_model_keeps_its_template(tmp_path, changes):
    config = mindvlm.api.read_config(write_tiny_tinyllava(tmp_path, dialect="phi"))
    config.processor = dataclasses.replace(config.processor, **changes)
    read_again(config, tmp_path / "again")


def test_a_model_keeps_what_it_is_for(tmp_path):
    config = mindvlm.api.read_config(write_tiny_tinyllava(tmp_path))
    assert config.scope is None and "scope" not in read_again(config, tmp_path / "without")
    config.scope = Scope(note="Counts cells.", questions=["How many cells are there?"], one_picture=True)
    written = read_again(config, tmp_path / "with")
    path = tmp_path / "with" / "config.json"
    for scope, said in (({"notes": ""}, "unknown config key 'scope.notes'; did you mean"), (5, "section 'scope' is 5")):
        path.write_text(json.dumps(written | {"scope": scope}))
        with pytest.raises(UserError, match=f"^{path}: .*{said}"):
            mindvlm.api.read_config(path)


def read_again(config, folder: Path) -> dict:
    """Writes what stands beside trained weights into `folder`, which must give the same config; its config.json."""
    files = get_family("tinyllava").companions(config)
    assert {"config.json", "tokenizer.model", "tokenizer_config.json"} <= set(files)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = mindvlm.api.read_config(folder)
    assert (found.model, found.scope) == (config.model, config.scope)
    assert {**vars(found.processor), "tokenizer": ""} == {**vars(config.processor), "tokenizer": ""}
    return json.loads(files["config.json"])


def test_an_adapter_has_the_published_names_and_predicts(tmp_path):
    lora = {"rank": 2, "alpha": 8, "targets": [r"^language_model\.layers\."], "modules_to_save": [r"^mm_projector\."]}
    trainer = train(llava_job(tmp_path, lora=lora, optimizer__learning_rate=0.02))
    step = tmp_path / "run" / "step-2"
    adapter = read_all(step / "adapter_model.safetensors")
    prefix = "base_model.model.model."
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {
        f"{prefix}layers.{layer}.{name}.lora_{factor}.weight" for layer in (0, 1) for name in linears for factor in "AB"
    }
    expected |= {f"{prefix}mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(adapter) == expected
    written = json.loads((step / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["modules_to_save"]) == (
        2,
        8,
        ["model.mm_projector.0", "model.mm_projector.2"],
    )
    options = dict(device="cpu", mode="pynative")
    convert(ConversionRequest(sources=(tmp_path / "model",), target=tmp_path / "merged", to="hf", merge_lora=step))
    trainer.model.set_train(False)
    config = mindvlm.api.read_config(tmp_path / "model", options)
    processor = get_family("tinyllava").processor(config.processor)
    live = VisionLanguageModel(trainer.model, processor, config)
    expected = live.logits("<image>\nWhat?", picture())
    base = mindvlm.load(tmp_path / "model", **options).logits("<image>\nWhat?", picture())
    assert np.abs(expected - base).max() > 1e-2 * np.abs(base).max(), "nothing was learned"
    whole = torch.load(step / "non_lora_trainables.bin", weights_only=True)
    assert set(whole) == {name for name in adapter if ".lora_" not in name}
    for name, array in whole.items():
        np.testing.assert_array_equal(array.numpy(), adapter[name])
    original = as_the_original_saves_it(step, tmp_path / "original")
    for found in (
        mindvlm.load(tmp_path / "model", adapter=step, **options),
        mindvlm.load(tmp_path / "model", adapter=original, **options),
        mindvlm.load(tmp_path / "merged", **options),
    ):
        np.testing.assert_allclose(
            found.logits("<image>\nWhat?", picture()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )


def test_a_run_of_the_connector_alone_leaves_it_for_other_programs(tmp_path):
    tune = {"language_model": False, "embed_tokens": True}
    for name, changes, more in (
        ("alone", {"language_model": False}, set()),
        ("rows", tune, {"model.embed_tokens.weight"}),
    ):
        output = tmp_path / name
        trainer = train(
            llava_job(
                tmp_path, output_dir=str(output), model_changes={"model": {"tune": changes}}, schedule__total_steps=1
            )
        )
        step = output / "step-1"
        loaded = torch.load(step / "mm_projector.bin", weights_only=True)
        assert set(loaded) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")} | more
        parameters = dict(trainer.model.parameters_and_names())
        for layer in (0, 2):
            trained = parameters[f"mm_projector.{layer}.weight"].asnumpy()
            np.testing.assert_array_equal(loaded[f"model.mm_projector.{layer}.weight"].numpy(), trained)
        # it does not stand in the way of the weights
        assert mindvlm.load(step, device="cpu", mode="pynative", cache=False).chat("What?", max_new_tokens=1).ids
    train(llava_job(tmp_path, output_dir=str(tmp_path / "all"), schedule__total_steps=1))
    assert not (tmp_path / "all/step-1/mm_projector.bin").exists()


def test_a_connector_of_which_a_part_trains_is_left_whole(tmp_path):
    """Half of it could not be read again."""
    freeze = [r"^language_model\.", r"^mm_projector\.0\."]
    train(llava_job(tmp_path, freeze=freeze, schedule__total_steps=1))
    loaded = torch.load(tmp_path / "run/step-1/mm_projector.bin", weights_only=True)
    assert set(loaded) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def as_the_original_saves_it(step: Path, folder: Path) -> Path:
    """The adapter of a run with the connector in a file of its own, which no modules_to_save names."""
    folder.mkdir()
    tensors = {name: torch.from_numpy(array) for name, array in read_all(step / "adapter_model.safetensors").items()}
    parts = {"adapter_model.bin": True, "non_lora_trainables.bin": False}
    for file, is_factor in parts.items():
        torch.save({name: value for name, value in tensors.items() if (".lora_" in name) == is_factor}, folder / file)
    config = json.loads((step / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_trained_tower_goes_into_its_own_repository(tmp_path):
    """Over the published repository, whose names and small files it takes; the original reads its tower from there."""
    job = llava_job(tmp_path, model_changes=SHARE, schedule__total_steps=1)
    prefix = "model.vision_tower.vision_tower."
    published = read_all(tmp_path / "model")
    tower = {name.removeprefix(prefix): array for name, array in published.items() if name.startswith(prefix)}
    (tmp_path / "siglip").mkdir()
    save_file(tower, tmp_path / "siglip" / "model.safetensors")
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(TOWER))
    trainer = train(job)
    sources = (tmp_path / "siglip", tmp_path / "run" / "step-1" / "weights.safetensors")
    options = {"to": "hf", "only": "vision_tower", "model": "tinyllava_llama"}
    convert(ConversionRequest(sources=sources, target=tmp_path / "vision_tower", **options))
    written = read_all(tmp_path / "vision_tower")
    assert set(written) == set(tower) and (tmp_path / "vision_tower" / "config.json").exists()
    name = "encoder.layers.2.mlp.fc1.weight"
    parameter = dict(trainer.model.parameters_and_names())[f"vision_tower.{name}"]
    np.testing.assert_array_equal(written[f"vision_model.{name}"], parameter.asnumpy())
    assert not np.array_equal(written[f"vision_model.{name}"], tower[f"vision_model.{name}"])
