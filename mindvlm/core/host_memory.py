"""Memory of the machine and of this process, as reported by Linux."""

import contextlib
from collections.abc import Mapping
from pathlib import Path


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
