"""Converted weights on disk, so that a checkpoint with foreign names is converted once and not at every start.

A checkpoint's folder in the cache holds two files: the tensors under native names, in the dtypes of the source, and a
manifest that says what they were made of and how. They are used if the manifest is word for word what it would be
today; everything else (changed sources, other rules, another version) is made anew. A file, that of the kept tensors
included, counts as the same while its path, links resolved, its size and the time of its last change are the same.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

import mindvlm
from mindvlm.checkpoint import Checkpoint, TensorSource, bytes_bar, open_checkpoint, staging_folder, write_safetensors
from mindvlm.core.errors import UserError

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


def cache_folder() -> Path:
    """`$MINDVLM_CACHE`, else `$XDG_CACHE_HOME/mindvlm`, else `~/.cache/mindvlm`; it need not exist.

    Raises:
        UserError: there is no home folder.
    """
    if chosen := os.environ.get("MINDVLM_CACHE"):
        return Path(os.path.expanduser(chosen)).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification has relative paths ignored
    if shared.is_absolute():
        return shared / "mindvlm"
    try:
        return Path.home() / ".cache" / "mindvlm"
    except RuntimeError as error:
        raise UserError("no home folder to keep converted weights in; set MINDVLM_CACHE to a folder") from error


def entry_folder(weights_file: Path, *others: Path) -> Path:
    """Where the converted tensors of a file, or of the shards of an index, are kept.

    Args:
        others: further files that tensors come from; of those in other folders, the folders count.
    """
    folder = weights_file.parent.resolve()
    folders = sorted({other.parent.resolve() for other in others} - {folder})
    # in the Hugging Face cache a folder has the name of a commit, two above it is that of the model
    named = folder.parent.parent if folder.parent.name == "snapshots" else folder
    name = re.sub(r"[^\w.-]", "_", named.name).lstrip(".")[:40] or "weights"
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, (folder / weights_file.name, *folders)))).hexdigest()
    return cache_folder() / f"{name}-{digest[:8]}"


def kept_weights(
    weights: TensorSource, files: Iterable[Path], *, say: Callable[[str], None] | None = None
) -> TensorSource:
    """The tensors of `weights` as the cache has them. If it has not, they are put there for the next time, and
    `weights` are returned; what hinders that is one line of a warning.

    Args:
        weights: converted while they are read.
        files: that they are read from, the one that the user knows first.
        say: called with one line before a conversion; with it and a terminal there is a bar, too.
    """
    files = tuple(dict.fromkeys(files))
    try:
        entry, manifest = entry_folder(*files), Manifest(files, weights.recipe)
        kept = open_entry(entry, manifest, weights)
        if kept is not None:
            return kept
        make_entry(entry, manifest, weights, say=say)
        return weights
    except UserError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename}: cannot be used ({error.strerror}); set MINDVLM_CACHE to a writable folder"
    warnings.warn(f"converted weights are not kept: {reason}", stacklevel=2)
    return weights


class Manifest:
    """What is made of some files, and how; the files are looked at when it is made.

    Args:
        recipe: of the tensors.
    """

    def __init__(self, files: Iterable[Path], recipe: str):
        sources = [{"path": str(file.resolve()), **state(file)} for file in files]
        self._entries = {"mindvlm": mindvlm.__version__, "recipe": recipe, "sources": sources}

    def text(self, kept: Path) -> str:
        """The manifest beside the file that was made, as JSON."""
        return json.dumps({**self._entries, "kept": state(kept)}, indent=1) + "\n"


def state(file: Path) -> dict[str, int]:
    """What tells a file from what it was before a change."""
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def open_entry(entry: Path, manifest: Manifest, weights: TensorSource) -> Checkpoint | None:
    """The tensors in `entry`, or None if they are not those of `weights` made as `manifest` says."""
    kept = None
    with suppress(UserError, OSError, UnicodeDecodeError):
        kept = open_checkpoint(entry / WEIGHTS)
        if kept.infos == dict(weights.infos):
            # opens the file: another process may put another one in its place, and the manifest is read after that
            kept.read_range(next(iter(kept.infos)), 0, 1)
            if is_made_as(entry, manifest):
                return kept
    if kept is not None:
        kept.close()
    return None


def is_made_as(entry: Path, manifest: Manifest) -> bool:
    """Whether the tensors in `entry` are those that `manifest` describes."""
    with suppress(OSError, UnicodeDecodeError):
        return (entry / MANIFEST).read_text(encoding="ascii") == manifest.text(entry / WEIGHTS)
    return False


def make_entry(
    entry: Path, manifest: Manifest, weights: TensorSource, *, say: Callable[[str], None] | None = None
) -> None:
    """Writes the tensors and their manifest in a hidden folder beside `entry`, which then takes its place.

    Raises:
        UserError: the disk has no room, or `weights` cannot be read.
        OSError: the folder of the cache cannot be made or written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(info.num_bytes for info in weights.infos.values())
    free = shutil.disk_usage(entry.parent).free
    size, room = (tqdm.format_sizeof(number, "B") for number in (needed, free))
    if needed > free:
        raise UserError(f"{entry.parent}: has {room} free and they take {size}; make room or set MINDVLM_CACHE")
    if say:
        say(f"converting {weights.path}; converted weights are kept in {entry} ({size})")
    with staging_folder(entry) as staging:
        made = staging / entry.name
        made.mkdir()
        with bytes_bar(weights, "converting", show=say is not None and sys.stderr.isatty()) as bar:
            write_safetensors(made / WEIGHTS, weights, progress=lambda _, written: bar.update(written))
        (made / MANIFEST).write_text(manifest.text(made / WEIGHTS), encoding="ascii")
        with suppress(FileNotFoundError):
            os.rename(entry, staging / "earlier")
        # another process may have put its own there meanwhile
        with suppress(OSError):
            os.rename(made, entry)
