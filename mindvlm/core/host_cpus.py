"""The CPUs that this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path


def num_threads() -> int:
    """Returns the number of threads that this process may run at once: its CPUs, its quota, `OMP_NUM_THREADS`."""
    # Windows and macOS have no affinity
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [bound, quota_of_cgroup()]
    with suppress(ValueError):
        counts.append(int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]))
    return max(1, min(count for count in counts if count is not None))


def quota_of_cgroup(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the CPUs that the process's control group (version 2, then 1) may use; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    with suppress(OSError, ValueError):
        quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return math.ceil(quota / period) if quota > 0 else None
    return None
