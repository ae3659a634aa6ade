"""Opening checkpoints: the format is chosen by the ending of the file's name."""

from __future__ import annotations

from pathlib import Path

from mindvlm.checkpoint.folder import find_weights, read_index
from mindvlm.checkpoint.mindspore_format import read_mindspore
from mindvlm.checkpoint.safetensors_format import read_safetensors
from mindvlm.checkpoint.stored import MAX_TENSORS, Checkpoint, Contents, check_info
from mindvlm.checkpoint.torch_format import read_torch
from mindvlm.core.errors import UserError

_READERS = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_mindspore,
}


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
    return Checkpoint(path, contents)


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
    contents = reader(path)
    if len(contents.tensors) > MAX_TENSORS:
        raise UserError(
            f"{path}: holds more than {MAX_TENSORS} tensors; the file is damaged, copy or download it again"
        )
    for tensor in contents.tensors.values():
        check_info(path, tensor.info)
    return contents
