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


def quota_of_cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns the CPUs that the process's control group (of version 1 or 2) may use; None without a limit.

    Args:
        root: where control groups are mounted. In a container, this is the group of the container.
        own: the file that names the groups of the process, lines of `number:controllers:/path`.
    """
    lines = []
    with suppress(OSError, UnicodeDecodeError):
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    paths = {kind: path for _, controllers, path in lines for kind in controllers.split(",")}
    quotas = [quota_of(folder) for folder in folders_above(root, paths.get("", "/"))]
    quotas += [quota_of(folder) for folder in folders_above(root / "cpu", paths.get("cpu", "/"))]
    return min((quota for quota in quotas if quota is not None), default=None)


def folders_above(root: Path, path: str) -> list[Path]:
    """Returns the folders of a control group and of those above it, whose quotas it shares."""
    group = root / path.lstrip("/")
    return [group, *(folder for folder in group.parents if folder.is_relative_to(root))]


def quota_of(folder: Path) -> int | None:
    """Returns the CPUs that the control group in a folder may use; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return math.ceil(quota / period) if quota > 0 else None
    return None
