"""The threads that a process may run, on pretended machines, and MindSpore's pool of that size."""

import os
import subprocess
import sys

import mindspore as ms
import pytest
from mindspore._c_expression import RuntimeConf

from mindvlm.core import host_cpus, runtime


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"own": "0::/", "cpu.max": "200000 100000"}, 2),
        ({"own": "0::/user/job", "user/job/cpu.max": "300000 100000"}, 3),
        ({"own": "0::/user/job", "user/cpu.max": "100000 100000", "user/job/cpu.max": "300000 100000"}, 1),
        ({"own": "0::/user", "user/job/cpu.max": "300000 100000"}, None),
        ({"own": "0::/../other", "cpu.max": "200000 100000"}, 2),
        (
            {
                "own": "5:memory:/other\n4:cpu,cpuacct:/job\n0::/",
                "cpu/job/cpu.cfs_quota_us": "200000",
                "cpu/job/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_quota_of_a_container(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_cpus.quota_of_cgroup(tmp_path, tmp_path / "own") == expected


@pytest.mark.parametrize(
    ("bound", "quota", "variable", "expected"),
    [(8, None, None, 8), (8, 2, None, 2), (8, 2, "1", 1), (2, 4, "16", 2), (8, None, "3,1", 3), (8, None, "many", 8)],
)
def test_the_least_of_affinity_quota_and_variable(monkeypatch, bound, quota, variable, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)))
    monkeypatch.setattr(host_cpus, "quota_of_cgroup", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert host_cpus.num_threads() == expected


@pytest.mark.parametrize(
    ("allowed", "num_cpus", "configured", "expected"),
    [(2, 16, False, [2]), (16, 16, False, []), (2, 16, True, [])],
)
def test_threads_of_the_kernels(monkeypatch, allowed, num_cpus, configured, expected):
    calls = []
    monkeypatch.setattr(runtime, "num_threads", lambda: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: num_cpus)
    monkeypatch.setattr(RuntimeConf, "is_op_threads_num_configured", lambda _: configured)
    monkeypatch.setattr(ms.device_context.cpu.op_tuning, "threads_num", calls.append)
    runtime.limit_kernel_threads()
    assert calls == expected


def test_a_start_limits_the_threads_once():
    code = (
        "from mindspore._c_expression import RuntimeConf; from mindvlm.core import runtime;"
        "config = runtime.RuntimeConfig(device='cpu', mode='pynative');"
        "runtime.start(config), runtime.start(config);"
        "print(RuntimeConf.get_instance().is_op_threads_num_configured())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str((os.cpu_count() or 1) > 1)]
