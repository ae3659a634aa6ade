"""A job of DeLVM's decoder under msrun: replicas and tensor-parallel processes give the numbers of one process."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.parallel.launch import start
from tests.training.delvm_job import write_job
from tests.training.small_job import losses, read_tensors

ROOT = Path(__file__).parents[2]
CHANGES = dict(schedule__total_steps=4, optimizer__learning_rate=1e-3, mode="pynative")
LAYOUTS = {"dp": {"dp": 2, "zero": 1}, "tp": {"tp": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a job that one process ran ("one"), two replicas ("dp"), and two processes that share the weights ("tp")."""
    folder = tmp_path_factory.mktemp("job")
    path = write_job(folder, rows_per_step=2, save_every=2, averages_passes=True, **CHANGES)
    Trainer(read_job(path, {"output_dir": str(folder / "one")})).train()
    for name, layout in LAYOUTS.items():
        arguments = ["--config_path", str(path), "--output_dir", str(folder / name)]
        for key, value in layout.items():
            arguments += ["--set", f"parallel.{key}={value}"]
        job = start(ROOT / "tools" / "train.py", *arguments, num_processes=2, log_dir=folder)
        console, _ = job.communicate(timeout=900)
        assert job.returncode == 0, console
    return folder


def require_equal_runs(first: Path, second: Path) -> None:
    np.testing.assert_allclose(losses(first), losses(second), rtol=1e-5)
    alone, shared = read_tensors(first / "step-4"), read_tensors(second / "step-4")
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_give_the_numbers_of_one(folder, name):
    require_equal_runs(folder / "one", folder / name)


def test_one_process_goes_on_from_the_checkpoint_of_two(folder, tmp_path):
    shutil.copytree(folder / "dp", tmp_path / "dp")
    shutil.rmtree(tmp_path / "dp" / "step-4")
    trainer = Trainer(read_job(folder / "job.yaml", {"output_dir": str(tmp_path / "dp")}))
    assert trainer.step == 2
    trainer.train()
    require_equal_runs(folder / "one", tmp_path / "dp")
