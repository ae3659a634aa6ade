"""SliME with the ratios of 70B and adapters: processes that share the weights train as one."""

from pathlib import Path

import pytest

from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.parallel.launch import start
from tests.tiny_slime import make_like_70b
from tests.training.small_job import write_job
from tests.training.test_lora_parallel import NUM_STEPS, require_equal_runs

pytestmark = pytest.mark.ci
ROOT = Path(__file__).parents[2]
# as train_70b_lora.yaml
LORA = {
    "rank": 4,
    "alpha": 8,
    "targets": [r"^language_model\.layers\."],
    "modules_to_save": ["^mm_projector", "^sampler"],
}
NOISE = {"model": {"gate_noise": True, "router": {"noise": 0.1}}}
LAYOUTS = {
    "two": ["parallel.tp=2"],
    "four": ["parallel.tp=4"],
    "replicas": ["parallel.tp=2", "parallel.dp=2", "parallel.zero=2", "data.batch_size=1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A job, and its run in one process ("one")."""
    folder = tmp_path_factory.mktemp("slime")
    changes = dict(schedule__total_steps=NUM_STEPS, rows_per_step=2, optimizer__eps=1e-5, model_changes=NOISE)
    changes |= dict(data__max_length=192, data__lengths=[192])
    path = write_job(folder, kind="slime", lora=LORA, init={"weights": ["model"]}, **changes)
    make_like_70b(folder / "model")
    Trainer(read_job(path, {"output_dir": str(folder / "one")})).train()
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_processes_learn_as_one(name, folder, tmp_path):
    arguments = ["--config_path", str(folder / "job.yaml"), "--output_dir", str(folder / name)]
    arguments += [argument for change in LAYOUTS[name] for argument in ("--set", change)]
    num_processes = 2 if name == "two" else 4
    job = start(ROOT / "tools" / "train.py", *arguments, num_processes=num_processes, log_dir=tmp_path)
    console, _ = job.communicate(timeout=900)
    assert job.returncode == 0, console[-3000:]
    require_equal_runs(folder / "one", folder / name)
