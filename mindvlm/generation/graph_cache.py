"""Compiled graphs on disk, so that a second start does not compile them again.

MindSpore can write a compiled graph to a file and read it instead of compiling, but it names the files by the order in
which a process compiles and reads whatever file has the next name. Here each graph is stored under its `graph_key`,
which covers everything that shapes it. While a graph is compiled, MindSpore's folder holds the file of this graph or
none; afterwards the folder is removed. MindSpore therefore never reads the file of another graph.

The environment variable `MINDVLM_COMPILE_CACHE=off` turns the cache off. It is also off on Ascend, where it is
untested, in the processes of a job, whose graphs hold ranks, and if MindSpore's own cache is on
(`MS_COMPILER_CACHE_ENABLE`).
"""

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, nn

from mindvlm.checkpoint import atomic_file
from mindvlm.core.caches import GRAPH_ENDING, GRAPHS, cache_folder, remove_oldest
from mindvlm.core.errors import UserError
from mindvlm.generation.graph_key import NoKeyError, graph_key
from mindvlm.parallel.launch import is_launched

logger = logging.getLogger(__name__)

MIN_FREE_BYTES = 2**28
"""Free space that the temporary folder needs. MindSpore prints errors when it cannot write a graph."""
DIGEST_SIZE = 32


def is_on() -> bool:
    """Whether graphs of this process are stored and read.

    Raises:
        UserError: `MINDVLM_COMPILE_CACHE` has a wrong value.
    """
    chosen = os.environ.get("MINDVLM_COMPILE_CACHE") or "on"
    if chosen not in ("on", "off"):
        raise UserError(f"MINDVLM_COMPILE_CACHE is {chosen!r}; expected on or off")
    has_own = os.environ.get("MS_COMPILER_CACHE_ENABLE") or ms.get_context("enable_compile_cache")
    is_supported = ms.get_context("device_target") == "CPU" and not is_launched()
    return chosen == "on" and not has_own and is_supported


def compile_cached(graph: nn.Cell, inputs: tuple[Tensor, ...], announce: Callable[[], None]) -> None:
    """Compiles a graph for inputs of these shapes, or reads it from the cache.

    A reason that prevents the use of the cache is a warning of one line, once per process; the graph is compiled then.

    Args:
        announce: called before a graph is compiled.
    """
    with _lock:
        entry, exchange = find_entry(graph, inputs), exchange_of_process()
        stored = entry.read() if entry and exchange else None
        if stored is None:
            announce()
        if entry is None or exchange is None:
            graph.compile(*inputs)
            return
        try:
            made = exchange.compile(graph, inputs, stored)
        except OSError as error:
            warn_once(f"{error.filename}: {error.strerror}; set TMPDIR to a folder with room")
        except Exception as error:
            # an error of the model occurs again without the cache
            logger.debug(f"{type(graph).__name__} is compiled without the cache: {error}")
            entry.remove()
        else:
            if made is not None:
                entry.write(made)
            return
        if stored is not None:
            announce()
        graph.compile(*inputs)


def find_entry(graph: nn.Cell, inputs: tuple[Tensor, ...]) -> "Entry | None":
    """Returns the place of a graph in the cache; None if it has no key, or there is no folder for the cache."""
    try:
        key = graph_key(graph, inputs)
        return Entry(cache_folder() / GRAPHS / f"{type(graph).__name__}-{key}{GRAPH_ENDING}", key)
    except NoKeyError as reason:
        logger.debug(f"{type(graph).__name__} is not cached: it holds {reason}")
    except UserError as error:
        warn_once(str(error))
    return None


@dataclass(frozen=True)
class Entry:
    """The file of a graph: a digest of its key and contents, and the graph as MindSpore writes it."""

    path: Path
    key: str

    def read(self) -> bytes | None:
        """Returns the stored graph; None if there is none or the file is damaged."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        digest, graph = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
        if digest != self.digest(graph):
            return None
        # another process may remove it; a folder may be read-only
        with suppress(OSError):
            os.utime(self.path)
        return graph

    def write(self, graph: bytes) -> None:
        """Stores a graph and removes old ones, see `remove_oldest`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as file:
                file.write(self.digest(graph) + graph)
            remove_oldest("graphs", self.path)
        except UserError as error:
            warn_once(f"{error}; make room, or set MINDVLM_CACHE to another folder")
        except OSError as error:
            warn_once(f"{error.filename}: {error.strerror}; set MINDVLM_CACHE to a writable folder")

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    def digest(self, graph: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + graph).digest()


class Exchange:
    """The folder in which MindSpore reads and writes the graphs of this process.

    MindSpore fixes the path at its first use, reads `compile_cache_N.mindir` before it compiles the N-th graph, and
    writes that file afterwards if it did not exist or could not be read.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mindvlm-graph-"))
        self.folder.rmdir()
        self.pid = os.getpid()
        self.index = 0

    def compile(self, graph: nn.Cell, inputs: tuple[Tensor, ...], stored: bytes | None) -> bytes | None:
        """Compiles a graph, or reads the stored one.

        Returns:
            The compiled graph; None if the stored one was used, or MindSpore wrote none.

        Raises:
            OSError: the folder cannot be used.
        """
        # a folder that is there belongs to someone else
        self.folder.mkdir(mode=0o700)
        try:
            if shutil.disk_usage(self.folder).free < MIN_FREE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
            files = self.folder / "rank_0" / "graph_cache"
            files.mkdir(parents=True)
            placed = files / f"compile_cache_{self.index}.mindir"
            self.index += 1
            if stored is not None:
                placed.write_bytes(stored)
            before = states(files)
            with mindspore_cache(self.folder):
                graph.compile(*inputs)
            written = [path for path, state in states(files).items() if before.get(path) != state]
            if not written:
                return None
            # of graphs that MindSpore counted otherwise, the next one has the right number
            self.index = int(written[0].stem.rpartition("_")[2]) + 1
            return written[0].read_bytes()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Returns the properties by which a rewritten graph is detected."""
    stats = {path: path.stat() for path in folder.glob("compile_cache_*.mindir")}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@contextmanager
def mindspore_cache(folder: Path):
    """Turns MindSpore's cache on inside the block."""
    # set for MindSpore's C++ code alone: its Python code would parse the program that runs, and all that it imports
    os.putenv("MS_COMPILER_CACHE_PATH", str(folder))
    os.putenv("MS_COMPILER_CACHE_ENABLE", "1")
    try:
        yield
    finally:
        os.unsetenv("MS_COMPILER_CACHE_ENABLE")
        os.unsetenv("MS_COMPILER_CACHE_PATH")


_lock = threading.Lock()
_exchange: Exchange | None = None
_has_warned = False


def exchange_of_process() -> Exchange | None:
    """Returns the Exchange of this process; None without a temporary folder, or in a fork of a process that has one."""
    global _exchange
    try:
        _exchange = _exchange or Exchange()
    except OSError as error:
        warn_once(f"no temporary folder ({error}); set TMPDIR to a writable one")
        return None
    return _exchange if _exchange.pid == os.getpid() else None


def warn_once(reason: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(f"compiled graphs are not kept: {reason}", stacklevel=3)
