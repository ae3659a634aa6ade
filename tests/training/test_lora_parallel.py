"""A job with adapters under msrun, or in several passes, gives the numbers and the adapter of one process."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.parallel.launch import start
from tests.training.small_job import losses, read_tensors, write_job

pytestmark = pytest.mark.ci
ROOT = Path(__file__).parents[2]
# towers with divided query, key and value in one matrix, the head, and dropout before divided inputs
LORA = {"rank": 2, "dropout": 0.3, "targets": ["^language_model", "^vision_"], "modules_to_save": ["^mm_projector"]}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a job that one process ran ("one"), two that share the weights ("two") and two replicas ("replicas")."""
    folder = tmp_path_factory.mktemp("lora")
    changes = dict(schedule__total_steps=NUM_STEPS, rows_per_step=2, save_every=2, optimizer__eps=1e-5)
    path = write_job(folder, mode="graph", lora=LORA, init={"weights": ["tiny.safetensors"]}, **changes)
    Trainer(read_job(path, {"output_dir": str(folder / "one")})).train()
    for name, changes in (("two", ["parallel.tp=2"]), ("replicas", ["parallel.dp=2", "data.batch_size=1"])):
        arguments = ["--config_path", str(path), "--output_dir", str(folder / name)]
        arguments += [argument for change in changes for argument in ("--set", change)]
        job = start(ROOT / "tools" / "train.py", *arguments, num_processes=2, log_dir=folder)
        console, _ = job.communicate(timeout=900)
        assert job.returncode == 0, console
        assert console.count("parameters train (") == 1
    return folder


def require_equal_runs(first: Path, second: Path) -> None:
    np.testing.assert_allclose(losses(first), losses(second), rtol=1e-5)
    for name in ("trained", "adapter_model", "optimizer"):
        alone, shared = (read_tensors(run / f"step-{NUM_STEPS}" / f"{name}.safetensors") for run in (first, second))
        assert alone.keys() == shared.keys()
        for key, values in alone.items():
            np.testing.assert_allclose(shared[key], values, rtol=1e-4, atol=2e-6, err_msg=key)


def test_divided_adapters_learn_as_whole_ones(folder):
    require_equal_runs(folder / "one", folder / "two")
    factors = read_tensors(folder / "one" / f"step-{NUM_STEPS}" / "trained.safetensors")
    still = [name for name, values in factors.items() if not values.any() and "encoder.layers.1" not in name]
    assert not still, "no gradient"


def test_one_process_goes_on_from_the_adapter_of_two(folder, tmp_path):
    shutil.copytree(folder / "two", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / f"step-{NUM_STEPS}")
    overrides = {"output_dir": str(tmp_path / "two"), "mode": "pynative"}
    trainer = Trainer(read_job(folder / "job.yaml", overrides))
    assert trainer.step == 2
    trainer.train()
    require_equal_runs(folder / "one", tmp_path / "two")


def test_replicas_drop_what_one_process_drops(folder):
    require_equal_runs(folder / "one", folder / "replicas")


def test_passes_drop_what_one_pass_drops(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "passes")
    shutil.rmtree(tmp_path / "passes" / f"step-{NUM_STEPS}")
    overrides = {"output_dir": str(tmp_path / "passes"), "mode": "pynative", "data.batch_size": 1}
    Trainer(read_job(folder / "job.yaml", overrides)).train()
    require_equal_runs(folder / "one", tmp_path / "passes")
