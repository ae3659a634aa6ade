"""Checkpoint folders are complete or absent, even if a kill ends the writing."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mindvlm.core.errors import UserError
from mindvlm.training.run_checkpoints import RunCheckpoints, read_state, write_state
from mindvlm.training.run_tensors import read_parameters, write_parameters

WRITER = """
import sys
from mindvlm.training.run_checkpoints import RunCheckpoints, write_state
checkpoints = RunCheckpoints(sys.argv[1])
step = (checkpoints.steps() or [0])[-1]
while True:
    step += 1
    def fill(folder):
        for name in ("a", "b"):
            (folder / name).write_text(str(step) * 20000)
        write_state(folder, {"step": step, "source": {}, "job": {}, "rng": []})
    checkpoints.write(step, fill)
    checkpoints.prune(2)
    print(step, flush=True)
"""


@contextmanager
def largest_file(num_bytes: int):
    """A disk that takes no larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(checkpoints, step, text="x"):
    def fill(folder):
        (folder / "weights").write_text(text)
        write_state(folder, {"step": step, "source": {}, "job": {}, "rng": []})

    return checkpoints.write(step, fill)


def test_the_newest_are_kept_and_the_best_besides(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "run")
    for step in (9, 10, 100, 20):
        write(checkpoints, step)
    assert checkpoints.steps() == [9, 10, 20, 100] and checkpoints.latest().name == "step-100"
    checkpoints.prune(2, besides=9)
    assert checkpoints.steps() == [9, 20, 100]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-100", "step-20", "step-9"]


def test_a_folder_without_state_is_no_checkpoint(tmp_path):
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-x").mkdir()
    assert RunCheckpoints(tmp_path).latest() is None


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)
    write(checkpoints, 3, "old")
    assert (write(checkpoints, 3, "new") / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_full_disk_keeps_the_last_good_one(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)
    write(checkpoints, 1)
    parameters = {"a": Parameter(Tensor(np.zeros(100_000, np.float32)), name="a")}
    with largest_file(50_000):
        with pytest.raises(UserError, match=r"step 2: .*step-1 is kept.*free disk space") as error:
            checkpoints.write(2, lambda folder: write_parameters(folder / "weights.safetensors", parameters))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"] and read_state(tmp_path / "step-1")["step"] == 1


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)

    def fill(folder):
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(1, fill)
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_every_listed_checkpoint_is_complete(tmp_path):
    dice = random.Random(4)
    before = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(dice.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = RunCheckpoints(tmp_path).steps()
        assert steps and steps[-1] > before, "each run resumes from the last one"
        before = steps[-1]
        for step in steps:
            folder = tmp_path / f"step-{step}"
            assert read_state(folder)["step"] == step
            assert {(folder / name).read_text() for name in ("a", "b")} == {str(step) * 20000}
    write(RunCheckpoints(tmp_path), before + 1)
    RunCheckpoints(tmp_path).prune(1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{before + 1}"], "what the kills left is gone"


def test_two_processes_do_not_share_a_folder(tmp_path):
    first, second = RunCheckpoints(tmp_path), RunCheckpoints(tmp_path)
    first.lock()
    with pytest.raises(UserError, match="another process trains into it"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir.*cannot be created"):
        RunCheckpoints(tmp_path / "file" / "run")


@pytest.mark.parametrize("text", ["", "[]", '{"step": "x"}', "{"])
def test_a_damaged_state_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match="state.json.*remove"):
        read_state(tmp_path)


def test_tensors_return_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    start = {
        "a.weight": Tensor(rng.standard_normal((3, 5)).astype(np.float32)),
        "half": Tensor(rng.standard_normal(7).astype(np.float16)),
        "brain": Tensor(rng.standard_normal(7).astype(np.float32)).astype(ms.bfloat16),
        "count": Tensor(41, ms.int32),
        "scalar": Tensor(0.1, ms.float32),
    }
    parameters = {name: Parameter(value, name=name) for name, value in start.items()}
    write_parameters(tmp_path / "all.safetensors", parameters)
    blank = {
        name: Parameter(Tensor(np.zeros(p.shape, np.float32)).astype(p.dtype), name=name)
        for name, p in parameters.items()
    }
    read_parameters(tmp_path / "all.safetensors", blank)
    for name, value in start.items():
        assert blank[name].dtype == value.dtype
        np.testing.assert_array_equal(
            blank[name].astype(ms.float32).asnumpy(), value.astype(ms.float32).asnumpy(), err_msg=name
        )


def test_tensors_of_another_model_are_refused(tmp_path):
    def parameter(name, size):
        return {name: Parameter(Tensor(np.zeros(size, np.float32)), name=name)}

    write_parameters(tmp_path / "a.safetensors", parameter("a", 3))
    for other in (parameter("a", 4), parameter("b", 3)):
        with pytest.raises(UserError, match="another model or optimizer"):
            read_parameters(tmp_path / "a.safetensors", other)


def test_best_names_the_checkpoint(tmp_path):
    RunCheckpoints(tmp_path).write_best({"checkpoint": "step-3", "cer": 0.5})
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "step-3", "cer": 0.5}
    assert os.listdir(tmp_path) == ["best.json"]
