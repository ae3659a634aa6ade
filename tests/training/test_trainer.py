"""The training loop: what is written when, how a run goes on, what ends it. Steps are counted, not computed, where only
the loop is meant."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindvlm.api import load
from mindvlm.core.errors import UserError
from mindvlm.models.own_training import Evaluation, Reading
from mindvlm.training import trainer as trainer_module
from mindvlm.training.job_file import read_job
from mindvlm.training.step_runner import Outcome
from mindvlm.training.trainer import Trainer
from tests.tiny_vary import picture
from tests.training.counting import CountingStepRunner
from tests.training.small_job import losses, metrics, read_tensors, small_job, write_data, write_job
from tests.training.test_run_checkpoints import largest_file

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "vary"
NANO = yaml.safe_load((CONFIGS / "train_nano.yaml").read_text())


@pytest.fixture
def counted(monkeypatch):
    """Makes trainers that count."""
    monkeypatch.setattr(trainer_module, "StepRunner", CountingStepRunner)
    monkeypatch.setattr(CountingStepRunner, "bad", {})
    return Trainer


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_vary_nano_keeps_its_numbers(tmp_path):
    """Losses and norms of the first steps as of the first version of this trainer."""
    model = yaml.safe_load((CONFIGS / "vary_nano.yaml").read_text())
    model["processor"]["vocab_file"] = str(CONFIGS / model["processor"]["vocab_file"])
    model["model"]["language_model"].update(num_hidden_layers=1, intermediate_size=32)
    model["model"]["vision_tower"].update(num_hidden_layers=1, intermediate_size=32)
    model["model"]["vision_vocabulary"].update(depth=1, global_attn_indexes=[0], mlp_ratio=1)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    job = {
        "model_config": "model.yaml",
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "rendered_text": {"batch_size": 2, "num_evaluation_images": 2, "curriculum_threshold": 100.0},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01, "no_decay": NANO["optimizer"]["no_decay"]},
        "schedule": {"total_steps": 4, "warmup_steps": 1, "decay_steps": 0},
        "log_every": 1,
        "best": "cer",
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    Trainer(read_job(tmp_path / "job.yaml")).train()
    expected = [
        (5.853403568267822, 3.2739484310150146),
        (5.657041549682617, 3.4619932174682617),
        (5.800325393676758, 3.4773457050323486),
        (5.567864418029785, 3.4902729988098145),
    ]
    np.testing.assert_allclose([line[1:] for line in losses(tmp_path / "run")], expected, rtol=2e-5)
    assert {"cer", "cer_stage", "edit_distance"} <= set(metrics(tmp_path / "run")[-1])


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def test_killed_at_any_moment_a_run_goes_on_to_the_last_digit(tmp_path, mode):
    changes = dict(mode=mode, schedule__total_steps=12, save_every=3, data__num_workers=1)
    path = write_job(tmp_path, kind="tiny", **changes)
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--config_path", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, "--output_dir", str(whole)], check=True, capture_output=True, env=environment)

    seed = random.randrange(1000)
    dice = random.Random(seed)
    wanted = dice.randint(4, 10)
    command += ["--output_dir", str(parts)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    while not (parts / "metrics.jsonl").exists() or len(metrics_safely(parts)) < wanted:
        assert process.poll() is None, f"ended before step {wanted} (seed {seed})"
        time.sleep(0.01)
    time.sleep(dice.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached, saved = len(metrics_safely(parts)), sorted(parts.glob("step-*"))
    assert saved and reached - max(int(one.name[5:]) for one in saved) <= 4, (
        f"lost more than since the last save {seed}"
    )

    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "resuming from" in done.stderr
    assert losses(parts) == losses(whole) and len(losses(whole)) == 12, f"seed {seed}"
    for name in ("weights.safetensors", "optimizer.safetensors"):
        first, second = read_tensors(whole / "step-12" / name), read_tensors(parts / "step-12" / name)
        assert first.keys() == second.keys()
        for tensor, value in first.items():
            np.testing.assert_array_equal(second[tensor], value, err_msg=f"{tensor}, seed {seed}")
    assert entries(parts) == ["metrics.jsonl", "step-12", "step-9"]

    model_config = next(tmp_path.glob("tiny*.yaml"))
    model = load(
        model_config, checkpoint=str(parts / "step-12" / "weights.safetensors"), mode="pynative", weights="float32"
    )
    weight = next(iter(model.model.get_parameters()))
    np.testing.assert_array_equal(
        weight.asnumpy(), read_tensors(parts / "step-12" / "weights.safetensors")[weight.name]
    )
    assert model.chat("Read.", picture(), max_new_tokens=1).stop_reason


def metrics_safely(folder: Path) -> list[str]:
    """Complete lines of a file that another process writes."""
    path = folder / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_a_run_in_parts_sees_every_sample_once_in_the_same_order(counted, tmp_path, monkeypatch):
    whole = counted(small_job(tmp_path, schedule__total_steps=14, output_dir=str(tmp_path / "whole"), save_every=5))
    whole.train()
    seen = []
    for stop in (3, 8, None):
        monkeypatch.setattr(CountingStepRunner, "stop_at", stop)
        part = counted(small_job(tmp_path, schedule__total_steps=14, save_every=1))
        if stop is None:
            part.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                part.train()
        seen += part.runner.seen
    assert seen == whole.runner.seen
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    flat = [origin for step in whole.runner.seen for origin in step]
    assert len(set(flat)) == len(flat) == 28 and len({origin.split("record ")[1] for origin in flat}) == 12


def test_logs_hold_means_that_do_not_depend_on_where_a_run_was_cut(counted, tmp_path):
    changes = dict(schedule__total_steps=8, log_every=4, save_every=3)
    counted(small_job(tmp_path, **changes)).train()
    expected = [np.mean([1 / n for n in (1, 2, 3, 4)]), np.mean([1 / n for n in (5, 6, 7, 8)])]
    assert [line[1] for line in losses(tmp_path / "run")] == expected
    shutil.rmtree(tmp_path / "run" / "step-8")
    resumed = counted(small_job(tmp_path, **changes))
    assert resumed.step == 6
    resumed.train()
    assert [line[1] for line in losses(tmp_path / "run")] == expected


def test_the_newest_and_the_best_checkpoint_are_kept(counted, tmp_path, monkeypatch):
    figures = iter([0.9, 0.4, 0.6, 0.5, 0.7])

    class Scripted:
        def evaluate(self):
            value = next(figures)
            return Evaluation({"cer": value, "edit_distance": 1 - value}, [Reading("a 1", "x", "y")])

    monkeypatch.setattr(trainer_module.building, "open_evaluator", lambda *args, **kwargs: Scripted())
    changes = dict(evaluation__datasets="words", best="cer", evaluate_every=2, save_every=3, keep_checkpoints=1)
    counted(small_job(tmp_path, schedule__total_steps=10, **changes)).train()
    run = tmp_path / "run"
    assert [path for path in entries(run) if path.startswith("step")] == ["step-10", "step-4"]
    assert json.loads((run / "best.json").read_text()) == {
        "checkpoint": "step-4",
        "step": 4,
        "cer": 0.4,
        "edit_distance": 0.6,
    }
    assert [one["cer"] for one in metrics(run) if "cer" in one] == [0.9, 0.4, 0.6, 0.5, 0.7]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 5


def test_a_loss_that_is_not_finite_stops_the_run_after_a_while_with_its_batch(counted, tmp_path, monkeypatch, said):
    monkeypatch.setattr(CountingStepRunner, "bad", {3: float("nan"), 6: float("nan"), 7: float("inf")})
    job = small_job(tmp_path, schedule__total_steps=20, save_every=1, max_nan_steps=2)
    with pytest.raises(
        UserError, match=r"loss is inf.*2 such steps, at step 8.*nan-step-8.npz.*step-6, is kept"
    ) as error:
        counted(job).train()
    assert "\n" not in str(error.value)
    run = tmp_path / "run"
    assert [name for name in entries(run) if "step" in name] == [
        "nan-step-4.npz",
        "nan-step-7.npz",
        "nan-step-8.npz",
        "step-5",
        "step-6",
    ]
    with np.load(run / "nan-step-8.npz") as batch:
        assert batch["0.input_ids"].shape == (2, 96) and batch["0.pixels.0"].ndim == 4
        assert all("data set 'words', record" in origin for origin in json.loads(str(batch["0.origins"])))
    assert sum("the loss is nan" in line for line in said) == 2


def test_a_loss_that_is_not_finite_in_the_last_step_ends_no_run(counted, tmp_path, monkeypatch, said):
    monkeypatch.setattr(CountingStepRunner, "bad", {4: float("nan"), 5: float("nan")})
    counted(small_job(tmp_path, schedule__total_steps=6, save_every=100, log_every=2)).train()
    assert [name for name in entries(tmp_path / "run") if name.startswith("step")] == ["step-6"]
    assert "loss" in metrics(tmp_path / "run")[-2] and "loss" not in metrics(tmp_path / "run")[-1]
    assert sum("nothing was updated" in line for line in said) == 2


def test_a_step_without_labels_has_no_loss_and_many_in_a_row_stop_the_run(counted, tmp_path, monkeypatch, said):
    monkeypatch.setattr(CountingStepRunner, "bad", {1: 0.0, 4: 0.0, 5: 0.0})
    job = small_job(tmp_path, schedule__total_steps=20, save_every=1, max_nan_steps=2)
    message = "no row has a label after 2 such steps, at step 6; .*step-4, is kept: choose the template of"
    with pytest.raises(UserError, match=message):
        counted(job).train()
    assert [line[0] for line in losses(tmp_path / "run")] == [1, 3, 4]
    assert sum("no row has a label; nothing was updated, the first row is sample" in line for line in said) == 3
    assert not list((tmp_path / "run").glob("nan-step*"))


def test_a_run_in_which_no_step_learned_is_an_error_and_saves_nothing(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(CountingStepRunner, "bad", {0: 0.0, 1: 0.0})
    message = "no row has a label after 2 such steps, at step 2; .*no checkpoint was written yet: .*data.max_length"
    with pytest.raises(UserError, match=message):
        counted(small_job(tmp_path, schedule__total_steps=2)).train()
    assert not list((tmp_path / "run").glob("step*"))
    overflow = Outcome(1.0, 1.0, is_finite=False, is_overflow=True)
    monkeypatch.setattr(CountingStepRunner, "run", lambda *inputs: overflow)
    with pytest.raises(UserError, match="no step learned anything, the gradients overflowed .*, 2; train more steps"):
        counted(small_job(tmp_path, schedule__total_steps=2)).train()


def test_a_full_disk_keeps_the_last_good_checkpoint(counted, tmp_path):
    trainer = counted(small_job(tmp_path, schedule__total_steps=4, save_every=2))
    trainer.train()
    trainer.step = 5
    with largest_file(20_000), pytest.raises(UserError, match="checkpoint of step 5: .*step-4 is kept"):
        trainer.save()
    assert [name for name in entries(tmp_path / "run") if "step" in name] == ["step-2", "step-4"]
    assert counted(small_job(tmp_path, schedule__total_steps=4)).step == 4


def test_another_config_is_refused_unless_accepted(counted, tmp_path, said):
    counted(small_job(tmp_path, schedule__total_steps=2)).train()
    changed = dict(schedule__total_steps=5, optimizer={"learning_rate": 0.5}, log_every=2)
    with pytest.raises(UserError, match=r"schedule.total_steps \(was 2, is 5\), optimizer.*--accept_changes|optimizer"):
        counted(small_job(tmp_path, **changed))
    trainer = counted(small_job(tmp_path, **changed), accept_changes=True)
    assert "changed: schedule.total_steps (was 2, is 5)" in said and trainer.step == 2
    trainer.train()
    assert metrics(tmp_path / "run")[-1]["step"] == 5
    with pytest.raises(UserError, match="holds step-5 of another run"):
        counted(small_job(tmp_path, resume="never"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__datasets": "word"}, "data.datasets.*'word'.*did you mean 'words'"),
        ({"data__registry": "none.yaml"}, "none.yaml does not exist"),
        ({"data__max_length": 999, "data__lengths": []}, "data.max_length is 999 but the model's max_length is 320"),
        ({"evaluation__datasets": "nothing"}, "unknown data set 'nothing'"),
        ({"init__weights": ["absent.safetensors"]}, "absent.safetensors"),
        ({"init__random": ["x"], "init__weights": ["tiny.safetensors"]}, "init.random: 'x' matches no parameter"),
        ({"model_config": "absent.yaml"}, "absent.yaml does not exist"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(counted, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        counted(small_job(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_an_empty_data_set_is_an_error(counted, tmp_path):
    job = small_job(tmp_path)
    (tmp_path / "words.json").write_text("[]")
    with pytest.raises(UserError, match="no record"):
        counted(job)


def test_data_that_have_grown_are_another_job(counted, tmp_path):
    counted(small_job(tmp_path, schedule__total_steps=2)).train()
    job = small_job(tmp_path, schedule__total_steps=2)
    write_data(tmp_path, 13)
    with pytest.raises(UserError, match=r"records of words \(was 12, is 13\)"):
        counted(job)


def test_data_of_another_weight_are_another_job(counted, tmp_path):
    counted(small_job(tmp_path, schedule__total_steps=2)).train()
    job = small_job(tmp_path, schedule__total_steps=2)
    registry = yaml.safe_load((tmp_path / "registry.yaml").read_text())
    registry["words"]["weight"] = 0.5
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(registry))
    with pytest.raises(UserError, match=r"weight of words \(was 1.0, is 0.5\)"):
        counted(job)


def test_groups_go_on_with_their_own_batches_alone(counted, tmp_path):
    changes = dict(schedule__total_steps=2, data__group_by_modality=True, rows_per_step=2)
    counted(small_job(tmp_path, **changes)).train()
    with pytest.raises(UserError, match=r"batch size of the groups \(was 2, is 1\)"):
        counted(small_job(tmp_path, **changes, data__batch_size=1))


def test_samples_that_cannot_be_used_are_counted_over_restarts(counted, tmp_path):
    job = small_job(tmp_path, schedule__total_steps=6, save_every=6)
    (tmp_path / "words" / "4.png").unlink()
    counted(job).train()
    assert metrics(tmp_path / "run")[-1]["skipped"] == 1
    (skipped,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert skipped["record"] == 4
    resumed = counted(small_job(tmp_path, schedule__total_steps=12), accept_changes=True)
    (tmp_path / "words" / "4.png").unlink()
    resumed.train()
    assert metrics(tmp_path / "run")[-1]["skipped"] == 2, "once an epoch"
