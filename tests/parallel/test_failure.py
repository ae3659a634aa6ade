"""A job of which one rank fails: the console, and the processes that remain."""

import re
from pathlib import Path

import pytest

from mindvlm.core.errors import UserError
from mindvlm.parallel import launch
from mindvlm.parallel.launch import ends_all_ranks
from tests.parallel.launch import start

WAYS = ("user_error", "defect", "killed", "mismatch")


@pytest.fixture(scope="module")
def consoles(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit status and console output of a job that fails in each way."""
    jobs = {}
    for how in WAYS:
        log_dir = tmp_path_factory.mktemp(how)
        jobs[how] = start(Path(__file__).with_name("failing_job.py"), how, num_processes=2, log_dir=log_dir)
    outputs = {how: job.communicate(timeout=300)[0] for how, job in jobs.items()}
    return {how: (jobs[how].returncode, output) for how, output in outputs.items()}


@pytest.mark.parametrize("how", ["user_error", "defect", "killed"])
def test_no_rank_outlives_another(how, consoles):
    status, output = consoles[how]
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", output)]
    assert status != 0
    assert len(pids) == 2, output
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_user_error_is_one_line_with_its_rank(consoles):
    assert "rank 1: error: sample 7 is missing; make it\n" in consoles["user_error"][1]


def test_a_defect_shows_where_it_is(consoles):
    output = consoles["defect"][1]
    assert "rank 1: Traceback" in output and "RuntimeError: an index is wrong" in output


def test_a_killed_rank_is_named_by_msrun(consoles):
    assert "Error code: -9" in consoles["killed"][1]


def test_a_mesh_of_another_size_is_refused_before_the_ranks_meet(consoles):
    output = consoles["mismatch"][1]
    assert (
        "error: parallel: dp 4 x tp 1 needs 4 processes but 2 are running; change the section or start msrun" in output
    )


def test_outside_a_job_errors_pass_through(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    with pytest.raises(UserError, match="as it was"), ends_all_ranks():
        raise UserError("as it was")


def test_alone_there_is_one_process_and_threads_stay(monkeypatch):
    for name in ("MS_ROLE", "RANK_TABLE_FILE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    launch.limit_threads()
    assert launch.world_size() == 1
    assert "OMP_NUM_THREADS" not in launch.os.environ


def test_ranks_divide_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch.limit_threads()
    assert launch.os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch.limit_threads()
    assert launch.os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.delenv("OMP_NUM_THREADS")


def test_a_slow_rank_is_waited_for(monkeypatch):
    monkeypatch.delenv("MS_CPU_COMM_OP_TIMEOUT", raising=False)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "60")
    launch.wait_for_slow_ranks()
    assert int(launch.os.environ["MS_CPU_COMM_OP_TIMEOUT"]) >= 600
    assert launch.os.environ["HCCL_EXEC_TIMEOUT"] == "60"
    monkeypatch.delenv("MS_CPU_COMM_OP_TIMEOUT")
