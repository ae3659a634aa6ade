"""The memory plans of `mindvlm-check`, for models and training jobs."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mindvlm.tools import preflight_memory
from tests.tiny_vary import tiny_config, write_tiny_vary, write_yaml
from tests.tools.checked import checker, found
from tests.training.delvm_job import write_job as write_delvm_job
from tests.training.small_job import write_job

CONFIGS = Path(__file__).parents[2] / "configs"
MIB = 2**20
# parameters of the published files less their two buffers; bytes of a position in the cache, in 16 bits
PUBLISHED = {
    "slime_7b": (7_072_790_528, 32 * 2 * 32 * 128 * 2),
    "slime_8b": (8_364_636_160, 32 * 2 * 8 * 128 * 2),
    "slime_13b": (13_360_727_040, 40 * 2 * 40 * 128 * 2),
    "slime_70b": (70_942_615_552, 80 * 2 * 8 * 128 * 2),
}


@pytest.fixture
def check(monkeypatch, capsys):
    return checker(monkeypatch, capsys)


def plan(out: str) -> dict[str, str]:
    """Number of processes -> what a device holds."""
    lines = [text for _, text in found(out)["plan"][1:]]
    return dict(line.split(": " if ": " in line else ", ", 1) for line in lines)


@pytest.mark.parametrize(
    "name, holders",
    [
        pytest.param("slime_7b", ["fits 32 GB"] * 4, marks=pytest.mark.ci),
        pytest.param("slime_8b", ["fits 32 GB"] * 4, marks=pytest.mark.ci),
        pytest.param("slime_13b", ["fits 64 GB"] + ["fits 32 GB"] * 3, marks=pytest.mark.ci),
        ("slime_70b", ["does not fit 64 GB"] * 2 + ["fits 64 GB", "fits 32 GB"]),
    ],
)
def test_the_plan_of_a_published_model(name, holders):
    """In a process of its own, because unfilled weights take memory that an earlier test has used."""
    command = [sys.executable, "-m", "mindvlm.tools.check_model", "--num_slots", "3", "--max_length", "2048"]
    command += ["--config_path", str(CONFIGS / "slime" / f"{name}.yaml")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    total, position = PUBLISHED[name]
    sizes = {}
    for number, text in plan(out).items():
        weights, cache = (int(text.partition(f"{part} ")[2].split()[0]) for part in ("weights", "cache"))
        count = int(number.split()[0])
        assert cache == math.ceil(3 * 2048 * position / count / MIB)
        sizes[count] = weights
    assert list(sizes) == [1, 2, 4, 8]
    assert sizes[1] == math.ceil(2 * total / MIB)
    # what is not whole in every process is halved each time
    assert sizes[1] - sizes[2] == pytest.approx(2 * (sizes[2] - sizes[4]), abs=3)
    assert sizes[2] - sizes[4] == pytest.approx(2 * (sizes[4] - sizes[8]), abs=3)
    assert sizes[8] < 1.05 * sizes[1] / 8 + 400
    assert [text.partition("(")[2].partition(")")[0] for text in plan(out).values()] == holders


def test_processes_that_cannot_share_a_model(check, tmp_path):
    status, out, _ = check("--config_path", write_tiny_vary(tmp_path))
    assert status == 0 and out.splitlines()[-1] == "ready"
    assert plan(out)["4 processes"].startswith("not possible, language_model has 2 heads, which 4 tensor-parallel")
    assert [line_status for line_status, _ in found(out)["plan"]] == ["ok", "ok", "ok", "skipped", "skipped"]


def test_memory_of_one_of_several_processes(check, tmp_path):
    _, whole, _ = check("--config_path", write_tiny_vary(tmp_path))
    status, out, _ = check("--config_path", write_tiny_vary(tmp_path, tensor_parallel=2))
    assert status == 0 and found(out)["memory"][0][1].startswith("each of 2 processes: load")
    status, out, _ = check("--config_path", write_tiny_vary(tmp_path, tensor_parallel=5))
    assert status == 2 and "5 tensor-parallel processes cannot share" in found(out)["memory"][0][1]
    assert "processes" not in found(whole)["memory"][0][1]
    status, out, _ = check("--config_path", write_yaml(tmp_path, tiny_config(tensor_parallel=0)))
    assert status == 2 and "tensor_parallel is 0; expected the number of processes" in found(out)["config"][0][1]


def test_the_plan_of_a_job(check, tmp_path):
    path = write_job(tmp_path, recompute=True)
    status, out, err = check("--config_path", path, "--set", "parallel.tp=2")
    assert (status, err) == (0, "")
    assert "dp 1 x tp 2, zero 0, 2 rows a pass, recompute" in out
    assert "each device: weights 1 MiB, gradients 1 MiB, optimizer 1 MiB, activations" in out
    assert out.splitlines()[-1] == "ready"


def test_the_plan_of_a_job_on_codes(check, tmp_path):
    status, out, err = check("--config_path", write_delvm_job(tmp_path))
    assert (status, err) == (0, "") and out.splitlines()[-1] == "ready"
    assert "training job of tiny of the family delvm" in out and "each device: weights 3 MiB" in out
    path = write_delvm_job(tmp_path, distillation={"teacher": "nowhere"})
    status, out, err = check("--config_path", path)
    assert (status, err) == (0, "") and out.splitlines()[-1] == "ready, with warnings: plan"
    assert re.search(r"not counted: the teacher .*nowhere, which is not there", found(out)["plan"][1][1])


def test_a_plan_that_does_not_fit_fails(check, tmp_path, monkeypatch):
    path = write_job(tmp_path)
    monkeypatch.setattr(preflight_memory, "free_host_memory", lambda: MIB)
    status, out, err = check("--config_path", path)
    assert status == 2 and "1 MiB are free; lower data.batch_size" in found(out)["plan"][0][1] and "ready" not in out
    monkeypatch.setattr(preflight_memory, "NPU_GIB", (0.0001, 0.001))
    status, out, err = check("--config_path", path, "--set", "device=auto")
    assert status == 2 and "does not fit 0.001 GB" in found(out)["plan"][0][1] and err.count("\n") == 1
    monkeypatch.setattr(preflight_memory, "free_host_memory", lambda: None)
    model = write_tiny_vary(tmp_path)
    assert check("--config_path", model)[1].splitlines()[-1] == "ready"
    status, out, err = check("--config_path", model, "--num_slots", 3)
    assert status == 2 and "no NPU holds 3 slots of" in out and "ready" not in out


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--set", "parallel.tp=3"], "3 tensor-parallel processes cannot share"),
        (["--set", "parallel.zero=1"], "parallel.zero is 1 but dp is 1"),
        (["--set", "freeze=[nothing]"], "'nothing' matches no"),
        (["--set", "optimiser=1"], "did you mean 'optimizer'"),
    ],
)
def test_a_job_that_cannot_be(check, tmp_path, options, expected):
    status, out, err = check("--config_path", write_job(tmp_path), *options)
    assert status == 2 and expected in out and err.startswith("error: 1 of 2 checks failed: ")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--num_slots", 0], "--num_slots is 0; expected at least 1"),
        (["--max_length", -4], "--max_length is -4; expected at least 1"),
        (["--set", "parallel.tp=2"], "--set changes a training job; give its YAML as --config_path"),
    ],
)
def test_options_of_the_plan(check, options, expected):
    assert check(*options) == (2, "", f"error: {expected}\n")
