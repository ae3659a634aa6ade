"""Free memory of a machine, of a container and of this process, and what the C library keeps."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindvlm.core import host_memory as memory

MIB = 1024**2


def write_counters(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def proc(tmp_path):
    return write_counters(
        tmp_path / "proc",
        meminfo="MemTotal:  9000 kB\nMemAvailable:  5000 kB\nHugePages_Total:  0\n",
        self__status="Name:\tpython\nRssAnon:\t  300 kB\n",
    )


def test_free_memory_without_a_limit(proc, tmp_path):
    # what this process holds will be free when it has ended
    assert memory.free_host_memory(proc, tmp_path / "none") == 5300 * 1024
    unlimited = write_counters(tmp_path / "cgroup", memory_dot_max="max\n", memory_dot_current="1\n")
    assert memory.free_host_memory(proc, unlimited) == 5300 * 1024


@pytest.mark.parametrize("limit, expected", [(2_000_000, 1_500_000), (10**9, 5000 * 1024), (100, 0)])
def test_free_memory_of_a_container(proc, tmp_path, limit, expected):
    cgroup = write_counters(
        tmp_path / "cgroup",
        memory_dot_max=f"{limit}\n",
        memory_dot_current="700000\n",
        memory_dot_stat="anon 1\ninactive_file 200000\n",
    )
    assert memory.free_host_memory(proc, cgroup) == expected + 300 * 1024


def test_free_memory_of_an_old_container(proc, tmp_path):
    cgroup = write_counters(
        tmp_path / "cgroup",
        memory__memory_dot_limit_in_bytes="2000000",
        memory__memory_dot_usage_in_bytes="700000",
        memory__memory_dot_stat="cache 7\ntotal_inactive_file 200000\n",
    )
    assert memory.free_host_memory(proc, cgroup) == 1_500_000 + 300 * 1024


def test_a_system_that_does_not_say(tmp_path):
    assert memory.free_host_memory(tmp_path, tmp_path) is None


def test_free_memory_of_this_machine():
    free = memory.free_host_memory()
    array = np.ones(64 * MIB, np.uint8)
    # a process's own memory counts as free to the next one
    assert abs(memory.free_host_memory() - free) < 1024 * MIB and array[0] and free > 256 * MIB


ALLOCATING = """
import ctypes, threading
import numpy as np
from mindvlm.core.host_memory import limit_freed_memory

{limit}
array = np.ones(2**17)
del array
arrays = [np.ones(2**17) for _ in range(100)]
libc, together = ctypes.CDLL(None), threading.Barrier(8)
def work():
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("limit", ["limit_freed_memory()", ""])
def test_threads_share_areas_and_large_arrays_have_pages_of_their_own(limit):
    command = [sys.executable, "-c", ALLOCATING.format(limit=limit)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    num_areas = found.count("<heap nr=")
    assert num_areas == 2 if limit else num_areas > 2
    assert (int(re.search(r'<total type="mmap" count="(\d+)"', found)[1]) >= 100) == bool(limit)
