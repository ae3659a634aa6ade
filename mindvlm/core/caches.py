"""The folder of everything that is kept between two starts."""

import os
import re
import shutil
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mindvlm.core.errors import UserError

GRAPHS, GRAPH_ENDING = "graphs", ".graph"
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
KINDS = {
    "weights": re.compile(r"\.?([^/]+)-[0-9a-f]{8}(\.\d+\.staging)?"),
    "kernels": re.compile(r"native/\.?(kernels)-[^/]+"),
    "graphs": re.compile(rf"{GRAPHS}/\.?(\w+)-[0-9a-f]{{64}}\{GRAPH_ENDING}(\.\d+\.partial)?"),
}
"""The paths in the folder; the first group is a name without a digest. A killed process leaves those that begin with a
dot."""
MAX_BYTES = {"weights": 2**36, "kernels": 2**24, "graphs": 2**30}
"""Size of each kind; beyond it, those that were not used for the longest time are removed."""
MAX_UNFINISHED_SECONDS = 24 * 3600
"""Time after which an unfinished entry is that of a killed process."""


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
        name: of the checkpoint or the kind of graph; several entries may have the same.
        num_bytes: size of all its files.
        used: time of the last use in seconds since 1970.
    """

    kind: str
    name: str
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
    folder = cache_folder()
    found = [
        entry
        for kind in kinds
        for path in (*paths_in(folder), *paths_in(folder / GRAPHS), *paths_in(folder / "native"))
        if (match := KINDS[kind].fullmatch(path.relative_to(folder).as_posix()))
        and (entry := entry_at(path, kind, match[1]))
    ]
    return sorted(found, key=lambda entry: entry.used)


def paths_in(folder: Path) -> list[Path]:
    """Returns what is in a folder; nothing if there is no such folder."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def entry_at(path: Path, kind: str, name: str) -> CacheEntry | None:
    """Returns the entry at a path; None if the path holds something else, or another process has just removed it."""
    try:
        files = [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path]
        if kind == "weights" and not holds_weights(path, files):
            return None
        stats = [file.stat() for file in files]
        # not the time of an access, which listing a folder changes
        return CacheEntry(kind, name, path, sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats))
    except (OSError, ValueError):
        return None


def holds_weights(folder: Path, files: Collection[Path]) -> bool:
    """Whether a folder with these files was made for converted weights, and not by somebody else under such a name."""
    if folder.name.startswith("."):
        return bool(files) and all(file.name in (WEIGHTS, MANIFEST) or f".{WEIGHTS}." in file.name for file in files)
    return set(files) == {folder / WEIGHTS, folder / MANIFEST} and '"mindvlm"' in (folder / MANIFEST).read_text()


def remove_oldest(kind: str, kept: Path) -> None:
    """Removes the entries of a kind beyond its `MAX_BYTES` that were not used for the longest time, but not `kept`.

    Also removes what killed processes left.
    """
    room = MAX_BYTES[kind]
    for entry in sorted(find_entries([kind]), key=lambda entry: (entry.path != kept, -entry.used)):
        is_unfinished = entry.path.name.startswith(".")
        if is_unfinished:
            is_removed = time.time() - entry.used > MAX_UNFINISHED_SECONDS
        else:
            room -= entry.num_bytes
            is_removed = room < 0 and entry.path != kept
        if is_removed:
            # another process may remove it meanwhile
            with suppress(OSError):
                entry.remove()
