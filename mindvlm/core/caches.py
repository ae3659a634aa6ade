"""The folder of everything that is kept between two starts."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mindvlm.core.errors import UserError

GRAPHS, GRAPH_ENDING = "graphs", ".graph"
KINDS = {
    "weights": re.compile(r"\.?[^/]+-[0-9a-f]{8}(\.\d+\.staging)?"),
    "kernels": re.compile(r"native/\.?kernels-[^/]+"),
    "graphs": re.compile(rf"{GRAPHS}/\.?\w+-[0-9a-f]{{64}}\{GRAPH_ENDING}(\.\d+\.partial)?"),
}
"""The names in the folder; a killed process leaves those that begin with a dot."""
MAX_BYTES = {"weights": 2**36, "kernels": 2**24, "graphs": 2**30}
"""Size of each kind; beyond it, those that were not used for the longest time are removed."""


def cache_folder() -> Path:
    """Returns `$MINDVLM_CACHE`, else `$XDG_CACHE_HOME/mindvlm`, else `~/.cache/mindvlm`; it need not exist.

    Raises:
        UserError: there is no home folder.
    """
    if chosen := os.environ.get("MINDVLM_CACHE"):
        return Path(os.path.expanduser(chosen)).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification ignores relative paths
    if shared.is_absolute():
        return shared / "mindvlm"
    try:
        return Path.home() / ".cache" / "mindvlm"
    except RuntimeError as error:
        raise UserError("no home folder to keep files in; set MINDVLM_CACHE to a folder") from error


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder in the cache.

    Attributes:
        kind: a key of `KINDS`.
        num_bytes: size of all its files.
        used: time of the last use in seconds since 1970.
    """

    kind: str
    path: Path
    num_bytes: int
    used: float

    def remove(self) -> None:
        """Removes the entry. Raises OSError if that is not permitted."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def find_entries(kinds: Iterable[str] = KINDS) -> list[CacheEntry]:
    """Returns the entries of these kinds in the order of their last use. Other files in the folder are ignored."""
    folder, entries = cache_folder(), []
    for kind in kinds:
        for path in (*folder.glob("*"), *folder.glob("*/*")):
            is_named = KINDS[kind].fullmatch(path.relative_to(folder).as_posix())
            if is_named and (kind != "weights" or any(path.rglob("*.safetensors"))):
                # another process may remove it meanwhile
                with suppress(OSError):
                    stats = [file.stat() for file in (path, *path.rglob("*"))]
                    used = max(max(stat.st_atime, stat.st_mtime) for stat in stats)
                    entries.append(CacheEntry(kind, path, sum(stat.st_size for stat in stats), used))
    return sorted(entries, key=lambda entry: entry.used)


def remove_oldest(kind: str, kept: Path) -> None:
    """Removes the entries of a kind beyond its `MAX_BYTES` that were not used for the longest time, but not `kept`.

    Entries that another process is writing stay.
    """
    entries = [entry for entry in reversed(find_entries([kind])) if not entry.path.name.startswith(".")]
    room = MAX_BYTES[kind] - sum(entry.num_bytes for entry in entries if entry.path == kept)
    for entry in entries:
        if entry.path != kept:
            room -= entry.num_bytes
            if room < 0:
                # another process may remove it meanwhile
                with suppress(OSError):
                    entry.remove()
