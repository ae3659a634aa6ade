"""A cache of converted weights on disk, so that a checkpoint with foreign names is converted once, not at every start.

A checkpoint's folder in the cache holds two files: the tensors under native names in the dtypes of the source, and a
manifest of the sources and the conversion. An entry is used if its manifest equals the one that would be written now;
otherwise (changed sources, other rules, another version) it is replaced. A file, including the one of the cached
tensors, counts as unchanged while its resolved path, size and modification time are the same.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

import mindvlm
from mindvlm.checkpoint import (
    Checkpoint,
    NonFiniteError,
    TensorSource,
    bytes_bar,
    open_checkpoint,
    staging_folder,
    write_safetensors,
)
from mindvlm.core.caches import MANIFEST, WEIGHTS, cache_folder, remove_oldest
from mindvlm.core.errors import UserError
from mindvlm.core.progress import is_progress_shown

logger = logging.getLogger(__name__)


def entry_folder(weights_file: Path, *others: Path) -> Path:
    """Returns the cache folder for the converted tensors of a file, or of the shards of an index.

    Args:
        weights_file: the file that the user names.
        others: further files that tensors come from; the name depends on their folders.
    """
    folder = weights_file.parent.resolve()
    folders = sorted({other.parent.resolve() for other in others} - {folder})
    # a folder in the Hugging Face cache is named after a commit, two levels below the name of the model
    named = folder.parent.parent if folder.parent.name == "snapshots" else folder
    name = re.sub(r"[^\w.-]", "_", named.name).lstrip(".")[:40] or "weights"
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, (folder / weights_file.name, *folders)))).hexdigest()
    return cache_folder() / f"{name}-{digest[:8]}"


def kept_weights(weights: TensorSource, files: Iterable[Path]) -> TensorSource:
    """Returns the cached tensors of `weights`; without a valid entry, writes one and returns `weights`.

    A reason that prevents the writing is a warning of one line.

    Args:
        weights: converted while they are read.
        files: the files that they are read from, the one that the user names first.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity, and the files were opened with `require_finite`.
    """
    files = tuple(dict.fromkeys(files))
    try:
        entry, manifest = entry_folder(*files), Manifest(files, weights.recipe)
        kept = open_entry(entry, manifest, weights)
        if kept is not None:
            return kept
        make_entry(entry, manifest, weights)
        return weights
    except NonFiniteError:
        raise
    except UserError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename}: cannot be used ({error.strerror}); set MINDVLM_CACHE to a writable folder"
    warnings.warn(f"converted weights are not kept: {reason}", stacklevel=2)
    return weights


class Manifest:
    """The sources of an entry, as they are now, and the recipe of its tensors."""

    def __init__(self, files: Iterable[Path], recipe: str):
        sources = [{"path": str(file.resolve()), **state(file)} for file in files]
        self._entries = {"mindvlm": mindvlm.__version__, "recipe": recipe, "sources": sources}

    def text(self, kept: Path) -> str:
        """Returns the manifest of the cached file `kept` as JSON."""
        return json.dumps({**self._entries, "kept": state(kept)}, indent=1) + "\n"


def state(file: Path) -> dict[str, int]:
    """Returns the properties by which a changed file is detected."""
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def identity(file: Path) -> tuple[int, int]:
    """Returns the properties by which a replaced file is detected."""
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns


def open_entry(entry: Path, manifest: Manifest, weights: TensorSource) -> Checkpoint | None:
    """Returns the tensors in `entry`, None if they are not those of `weights` or have another manifest."""
    kept = None
    with suppress(UserError, OSError, UnicodeDecodeError):
        before = identity(entry / WEIGHTS)
        kept = open_checkpoint(entry / WEIGHTS, require_finite=True, mapped=True)
        if kept.infos == dict(weights.infos):
            kept.read_range(next(iter(kept.infos)), 0, 1)
            # the file is open now; another process may have replaced it before its manifest is read
            if is_made_as(entry, manifest) and identity(entry / WEIGHTS) == before:
                # the time of the last use; the folder may be read-only
                with suppress(OSError):
                    os.utime(entry / MANIFEST)
                return kept
    if kept is not None:
        kept.close()
    return None


def is_made_as(entry: Path, manifest: Manifest) -> bool:
    """Whether the entry has this manifest."""
    with suppress(OSError, UnicodeDecodeError):
        return (entry / MANIFEST).read_text(encoding="ascii") == manifest.text(entry / WEIGHTS)
    return False


def make_entry(entry: Path, manifest: Manifest, weights: TensorSource) -> None:
    """Writes the tensors and their manifest in a hidden folder beside `entry`, then moves it there. Old entries go.

    Raises:
        UserError: the disk has no room, or `weights` cannot be read.
        OSError: the folder of the cache cannot be created or written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(info.num_bytes for info in weights.infos.values())
    free = shutil.disk_usage(entry.parent).free
    size, room = (tqdm.format_sizeof(number, "B") for number in (needed, free))
    if needed > free:
        raise UserError(f"{entry.parent}: has {room} free, they need {size}; make room or set MINDVLM_CACHE")
    logger.info(f"converting {weights.path}; converted weights are kept in {entry} ({size})")
    with staging_folder(entry) as staging:
        made = staging / entry.name
        made.mkdir()
        with bytes_bar(weights, "converting", show=is_progress_shown() and sys.stderr.isatty()) as bar:
            write_safetensors(made / WEIGHTS, weights, progress=lambda _, written: bar.update(written))
        (made / MANIFEST).write_text(manifest.text(made / WEIGHTS), encoding="ascii")
        with suppress(FileNotFoundError):
            os.rename(entry, staging / "earlier")
        # another process may have written its own meanwhile
        with suppress(OSError):
            os.rename(made, entry)
    remove_oldest("weights", entry)
