"""The four runs of SliME and asking the result, from the recipes as docs/slime.md has them."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mindvlm
from mindvlm.api import VisionLanguageModel
from mindvlm.checkpoint import open_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.models.registry import get_family
from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.tiny_slime import CONFIG, TOWER, write_tiny_parts
from tests.tiny_vary import picture
from tests.training.small_job import losses

CONFIGS = Path(__file__).parents[2] / "configs" / "slime"
# tall, wide, square, small and large pictures
SHAPES = ((30, 170), (200, 60), (90, 90), (10, 8), (300, 250))
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TOWER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
RUNS = ("1a", "1b", "2", "3")
PARTS = {"1a": "mm_projector.projection.", "1b": "mm_projector.attn.", "2": "sampler."}


def write_records(folder: Path) -> None:
    """Writes twenty records in the published layout: captions, and questions of which every fifth has no picture."""
    (folder / "images").mkdir()
    captions, mixture = [], []
    for number in range(20):
        color = (12 * number, 255 - 12 * number, 60)
        name = f"{number}.{'png' if number % 2 else 'jpg'}"
        Image.new("RGB", SHAPES[number % len(SHAPES)], color).save(folder / "images" / name)
        answer = {"from": "gpt", "value": f"A box {number % 3}."}
        captions.append(
            {"id": str(number), "image": name, "conversations": [{"from": "human", "value": "<image>\nSay."}, answer]}
        )
        asks = {"from": "human", "value": "What?" if number % 5 == 4 else "<image>\nWhat?"}
        record = {"id": str(number), "conversations": [asks, answer]}
        mixture.append(record if number % 5 == 4 else {**record, "image": name})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "mixture.json").write_text(json.dumps(mixture))
    (folder / "datasets.yaml").write_text(
        "llava_pretrain: {annotations: captions.json, images: images, format: llava}\n"
        "sharegpt4v_mix665k: {annotations: mixture.json, images: images, format: llava}\n"
        "smr: {annotations: captions.json, images: images, format: llava}\n"
    )


def tiny(run: str, folder: Path, changes: dict | None = None):
    """Returns the recipe of a run with the sizes of the tiny model."""
    overrides = {f"model_changes.model.language_model.{key}": CONFIG[key] for key in SIZES}
    overrides |= {f"model_changes.model.vision_tower.{key}": TOWER[key] for key in TOWER_SIZES}
    overrides |= {
        "model_changes.model.language_model.vocab_size": CONFIG["vocab_size"],
        "model_changes.model.language_model.head_dim": 8,
        "model_changes.model.language_model.rope_theta": 10000,
        "model_changes.model.separator_id": CONFIG["seperator"],
        "model_changes.model.num_local_tokens": 4,
        "model_changes.processor.tokenizer": str(folder / "vicuna-7b-v1.5"),
        "model_changes.processor.vocab_size": CONFIG["vocab_size"],
        "model_changes.processor.views.size": TOWER["image_size"],
        "model_changes.processor.views.num_global_tokens": 16,
        "model_changes.processor.views.num_local_tokens": 4,
        "data.registry": str(folder / "datasets.yaml"),
        "data.index_folder": str(folder),
        "data.batch_size": 2,
        "data.lengths": [128, 2048],
        "data.num_workers": 0,
        "rows_per_step": 4,
        "schedule.epochs": None,
        "schedule.total_steps": 2,
        "schedule.warmup_from_zero": False,
        "device": "cpu",
        "mode": "pynative",
        "dtype": "float32",
    }
    return read_job(CONFIGS / f"train_{run}.yaml", overrides | (changes or {}))


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).to_float32() for name in checkpoint.infos}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the results of the four runs, each of which starts from the files of the one before."""
    folder = tmp_path_factory.mktemp("slime")
    for path, name in zip(write_tiny_parts(folder), ("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), strict=True):
        path.rename(folder / name)
    write_records(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in RUNS:
            Trainer(tiny(f"7b_{run}", folder)).train()
            (folder / f"slime_7b_{run}").mkdir()
            for file in (folder / f"runs/slime_7b_{run}").glob("step-*/*.bin"):
                shutil.copy(file, folder / f"slime_7b_{run}")
    return folder


def test_each_run_changes_its_part_and_hands_over_the_rest(runs):
    weights = {run: read_all(runs / f"runs/slime_7b_{run}/step-2/weights.safetensors") for run in RUNS}
    fixed = ("pos_embed", "w_noise")
    for before, run in itertools.pairwise(RUNS):
        for name, array in weights[run].items():
            earlier = weights[before][name]
            if run == "3" and not name.startswith("vision_tower.") and not name.endswith(fixed):
                assert not np.array_equal(array, earlier), name
            elif name.startswith(PARTS.get(run, "no part")) and not name.endswith(fixed):
                assert not np.array_equal(array, earlier), name
            elif run == "3" or not name.startswith("sampler."):
                np.testing.assert_array_equal(array, earlier, err_msg=name)
    for run in ("1a", "1b", "2"):
        files = {path.name for path in (runs / f"slime_7b_{run}").iterdir()}
        assert files == {"mm_projector.bin", "sampler.bin"}
        assert np.isfinite([loss for _, loss, _ in losses(runs / f"runs/slime_7b_{run}")]).all()
    assert not list((runs / "slime_7b_3").iterdir())


def test_the_last_run_leaves_a_model_that_answers(runs):
    model = mindvlm.load(runs / "runs/slime_7b_3/step-2", device="cpu", mode="pynative", cache=False)
    assert model.config.processor.template == "v1" and model.config.model.router.top_p == 0.95
    assert model.chat("What?", picture(), max_new_tokens=2).ids


def test_an_adapter_joins_its_parts_or_a_whole_model(runs, monkeypatch):
    monkeypatch.chdir(runs)
    base = ["vicuna-7b-v1.5", "clip-vit-large-patch14-336"]
    weights = [*base, "slime_7b_2/mm_projector.bin", "slime_7b_2/sampler.bin"]
    changes = {"init.weights": weights, "model_changes.processor.template": "v1", "optimizer.learning_rate": 0.02}
    trainer = Trainer(tiny("8b_lora", runs, changes))
    trainer.train()
    step = runs / "runs/slime_8b_lora/step-2"
    whole = set(torch.load(step / "non_lora_trainables.bin", weights_only=True))
    parts = [file for name in ("mm_projector.bin", "sampler.bin") for file in torch.load(runs / "slime_7b_2" / name)]
    assert whole == {f"base_model.model.{name}" for name in parts}
    convert(
        ConversionRequest(
            sources=(*base, step / "non_lora_trainables.bin"), target=runs / "m.safetensors", merge_lora=step
        )
    )
    folder, options = runs / "runs/slime_7b_3/step-2", dict(device="cpu", mode="pynative", cache=False)
    trainer.model.set_train(False)
    config = mindvlm.api.read_config(folder)
    live = VisionLanguageModel(trainer.model, get_family("slime").processor(config.processor), config)
    question = ("<image>\nWhat?", picture())
    expected = live.logits(*question)
    before = str(runs / "runs/slime_7b_2/step-2/weights.safetensors")
    base = mindvlm.load(folder, checkpoint=before, **options).logits(*question)
    assert np.abs(expected - base).max() > 1e-2 * np.abs(base).max(), "nothing was learned"
    for found in (
        mindvlm.load(folder, checkpoint=str(runs / "m.safetensors"), **options),
        mindvlm.load(folder, checkpoint=before, adapter=step, **options),
    ):
        np.testing.assert_allclose(found.logits(*question), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
