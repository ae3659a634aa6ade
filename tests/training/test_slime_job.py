"""SliME through the production trainer: tiles, noise, evaluation, resuming, asking."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.training.trainer import Trainer
from tests.training.small_job import losses, metrics, read_tensors, small_job

SHAPES = [(60, 30), (30, 160), (200, 40), (50, 50), (90, 80)]
NOISY = {"model": {"gate_noise": True, "router": {"noise": 0.1}}}


def slime_job(folder: Path, **changes):
    """Returns a job over pictures with 2 to 7 crops, whose batches have one shape."""
    job = small_job(
        folder,
        kind="slime",
        **{
            "init": {"weights": ["model"]},
            "model_changes": NOISY,
            "data__max_length": 256,
            "data__lengths": [256],
            "data__image_slots": [2, 8],
            "evaluation": {"datasets": "words", "num_samples": 3, "batch_size": 2, "max_new_tokens": 2},
            "evaluate_every": 3,
            "save_every": 3,
            **changes,
        },
    )
    for number, path in enumerate(sorted((folder / "words").glob("*.png"))):
        Image.open(path).resize(SHAPES[number % len(SHAPES)]).save(path)
    return job


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def test_a_run_learns_and_its_second_half_is_the_same_after_a_stop(tmp_path, mode):
    changes = dict(mode=mode, schedule__total_steps=6, optimizer__learning_rate=3e-3)
    trainer = Trainer(slime_job(tmp_path, **changes))
    trainer.train()
    run = tmp_path / "run"
    expected, weights = losses(run), read_tensors(run / "step-6")
    assert len(expected) == 6 and min(loss for _, loss, _ in expected[3:]) < expected[0][1]
    assert len(trainer.seen_shapes) == (mode == "graph")
    figures = [one["cer"] for one in metrics(run) if "cer" in one]
    assert len(figures) == 2
    shutil.rmtree(run / "step-6")
    Trainer(slime_job(tmp_path, **changes)).train()
    assert losses(run)[-3:] == expected[3:]
    for name, array in read_tensors(run / "step-6").items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    model = mindvlm.load(run / "step-6", mode="pynative")
    assert model.config.model.router.noise == 0 and not model.config.model.gate_noise
    assert str(model.chat("Read.", tmp_path / "words" / "0.png", max_new_tokens=3)) is not None


def test_answers_while_training_are_those_of_the_saved_model(tmp_path):
    changes = dict(schedule__total_steps=1, schedule__warmup_steps=0, evaluation__max_new_tokens=4)
    trainer = Trainer(slime_job(tmp_path, **changes))
    trainer.train()
    readings = trainer.evaluator.evaluate().readings
    model = mindvlm.load(tmp_path / "run" / "step-1", mode="pynative")
    for number, reading in enumerate(readings):
        answer = model.chat("Read.", tmp_path / "words" / f"{number}.png", max_new_tokens=4)
        assert reading.text == str(answer)


def test_passes_and_adapters_train(tmp_path):
    changes = {"accumulation": 2, "lora": {"rank": 2, "dropout": 0.5, "modules_to_save": [r"^mm_projector\."]}}
    trainer = Trainer(slime_job(tmp_path, schedule__total_steps=2, recompute=True, **changes))
    before = {parameter.name: parameter.asnumpy().copy() for parameter in trainer.model.trainable_params()}
    trainer.train()
    assert trainer.runner.step.num_passes is trainer.model.noise.counter
    assert int(trainer.model.noise.counter.asnumpy()) == 4
    changed = {one.name for one in trainer.model.trainable_params() if (one.asnumpy() != before[one.name]).any()}
    assert any("lora_B" in name for name in changed) and "mm_projector.w_gate" in changed


def test_slots_of_another_number_of_kinds_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.image_slots is \[2\], but the model has 2 view kinds; give one entry"):
        Trainer(slime_job(tmp_path, data__image_slots=[2]))


def test_the_tower_cannot_train(tmp_path):
    with pytest.raises(UserError, match="matches only parameters that cannot train, such as vision_tower"):
        Trainer(slime_job(tmp_path, train=[r"^vision_tower\."]))
