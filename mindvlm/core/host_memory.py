"""Memory of the machine and of this process: what Linux reports, and what the C library keeps after it was freed."""

import contextlib
import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's `mallopt`."""

ALLOCATION = {M_ARENA_MAX: 2, M_MMAP_THRESHOLD: 1024**2, M_TRIM_THRESHOLD: 32 * 1024**2}
"""Areas of memory; bytes from which an allocation gets pages of its own; free bytes at the end of an area."""


def free_host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the bytes available to a process that replaces this one, without swapping; None if unknown.

    This is the smaller of MemAvailable and the free part of the container's limit, plus the memory of this process.
    """
    available = counters(proc / "meminfo").get("MemAvailable:")
    if available is None:
        return None
    mine = counters(proc / "self/status").get("RssAnon:", 0)
    return min([available, *container_room(cgroup)]) + mine


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes, shared libraries included; 0 if unknown."""
    return counters(Path("/proc/self/status")).get("VmHWM:", 0)


def limit_freed_memory() -> None:
    """Limits the memory that the C library keeps after this process has freed it. Call it before threads are started.

    glibc has up to 8 areas for each CPU, which it calls arenas; what is freed in one is not used by the threads of
    the others. Large arrays get pages of their own, which go back to the system, but by default only until the first
    one is freed, and then they break up the areas. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for parameter, value in ALLOCATION.items() if mallopt else ():
        mallopt(parameter, value)


def container_room(cgroup: Path) -> list[int]:
    """Returns the bytes left below the memory limit of this container (cgroup 2, then 1); empty without a limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            room = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            statistics = (cgroup / limit).with_name("memory.stat").read_text().split()
            reclaimable = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(cache, 0)
            return [max(0, room + int(reclaimable))]
    return []


def counters(path: Path) -> Mapping[str, int]:
    """Returns the kB lines of a /proc file in bytes; empty if there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {fields[0]: int(fields[1]) * 1024 for fields in lines if len(fields) == 3 and fields[2] == "kB"}
