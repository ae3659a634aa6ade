"""A whole job under msrun, from the command line: the numbers of one process, which can go on from its checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.parallel.launch import start
from tests.training.small_job import losses, metrics, read_tensors, write_job

ROOT = Path(__file__).parents[2]
EVALUATION = {"datasets": "words", "num_samples": 3, "batch_size": 3, "max_new_tokens": 2, "num_shown": 1}


@pytest.fixture(scope="module", params=["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def folder(tmp_path_factory, request) -> Path:
    """Of a job that one process ran ("one"), and two replicas with ZeRO-2 ("two"); their console is in console.txt."""
    folder = tmp_path_factory.mktemp("job")
    changes = dict(mode=request.param, rows_per_step=4, save_every=2, evaluation=EVALUATION, schedule__total_steps=4)
    path = write_job(folder, **changes)
    (folder / "words" / "4.png").unlink()
    Trainer(read_job(path, {"output_dir": str(folder / "one")})).train()
    arguments = ["--config_path", str(path), "--output_dir", str(folder / "two")]
    arguments += ["--set", "parallel.dp=2", "--set", "parallel.zero=2"]
    job = start(ROOT / "tools" / "train.py", *arguments, num_processes=2, log_dir=folder)
    console, _ = job.communicate(timeout=900)
    assert job.returncode == 0, console
    (folder / "console.txt").write_text(console)
    return folder


def require_equal_runs(first: Path, second: Path) -> None:
    np.testing.assert_allclose(losses(first), losses(second), rtol=1e-5)
    alone, shared = read_tensors(first / "step-4"), read_tensors(second / "step-4")
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_two_processes_give_the_numbers_of_one(folder):
    require_equal_runs(folder / "one", folder / "two")
    for run in ("one", "two"):
        assert metrics(folder / run)[-1]["step"] == 4 and "cer" in metrics(folder / run)[-1]
    assert metrics(folder / "one")[-1] == metrics(folder / "two")[-1], "the evaluation"


def test_samples_skipped_on_any_rank_are_counted(folder):
    counts = [[one["skipped"] for one in metrics(folder / run) if "skipped" in one] for run in ("one", "two")]
    assert counts[0] == counts[1] and counts[0][-1] >= 1
    listed = [json.loads(line) for path in (folder / "two").glob("skipped*") for line in path.read_text().splitlines()]
    assert [one["record"] for one in listed] == [4]


def test_progress_is_on_the_console_once(folder):
    console = (folder / "console.txt").read_text()
    assert console.count("step 3/4 | loss") == 1 and console.count("saved ") == 2


def test_one_process_goes_on_from_the_checkpoint_of_two(folder, tmp_path, said):
    shutil.copytree(folder / "two", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "step-4")
    trainer = Trainer(read_job(folder / "job.yaml", {"output_dir": str(tmp_path / "two")}))
    assert trainer.step == 2
    trainer.train()
    require_equal_runs(folder / "one", tmp_path / "two")
