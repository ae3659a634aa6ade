"""Opening and writing checkpoints: the format is chosen by the ending of the file's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mindvlm.checkpoint.folder import find_weights, read_index
from mindvlm.checkpoint.mindspore_format import read_mindspore, write_mindspore
from mindvlm.checkpoint.safetensors_format import read_safetensors, write_safetensors
from mindvlm.checkpoint.source import TensorSource
from mindvlm.checkpoint.stored import Checkpoint, Contents
from mindvlm.checkpoint.torch_format import read_torch
from mindvlm.errors import UserError

_READERS = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_mindspore,
}
_WRITERS = {".safetensors": write_safetensors, ".ckpt": write_mindspore}
WRITABLE_ENDINGS = tuple(_WRITERS)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: `.safetensors`, torch `.bin/.pt/.pth`, MindSpore `.ckpt`, an index of shards, or a folder.

    Only headers are read; tensors are read when asked for. Nothing in the file is executed.

    Raises:
        UserError: missing, unreadable, truncated, damaged, or of an unknown kind.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = find_weights(path)
        contents = read_index(path, _read_file) if path.name.endswith(".index.json") else _read_file(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and permissions"
        ) from error
    if not contents.tensors:
        raise UserError(f"{path}: holds no tensors; give a file of weights")
    for name in contents.tensors:
        if not name or not name.isprintable():
            raise UserError(f"{path}: holds a tensor with the unprintable name {name[:80]!r}; the file is damaged")
    return Checkpoint(path, contents)


def write_checkpoint(
    path: str | Path,
    source: TensorSource,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write `source` to a `.safetensors` or MindSpore `.ckpt` file, streaming; the file appears when complete.

    `metadata` is a table of short texts kept in the file; `progress` is called with tensor name and bytes written.

    Raises:
        UserError: another ending, an unwritable path, a full disk, or a source that cannot be read.
    """
    check_ending(path)
    _WRITERS[Path(path).suffix](path, source, metadata=metadata, progress=progress)


def check_ending(path: str | Path) -> None:
    """Raise UserError unless checkpoints can be written to a file of this name."""
    if Path(path).suffix not in _WRITERS:
        raise UserError(f"{path}: cannot write this kind of file; end the name with {' or '.join(WRITABLE_ENDINGS)}")


def _read_file(path: Path) -> Contents:
    reader = _READERS.get(path.suffix)
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if reader is None:
        known = ", ".join((*_READERS, ".index.json"))
        raise UserError(f"{path}: unknown kind of checkpoint {path.suffix!r}; expected one of {known}, or a folder")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; give a file of weights or a folder")
    with open(path, "rb") as file:
        if file.read(12) == b"version http":
            raise UserError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    return reader(path)
