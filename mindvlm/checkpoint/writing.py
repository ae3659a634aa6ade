"""Writing a checkpoint: the format is chosen by the ending, several files appear together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from mindvlm.checkpoint.atomic import PendingFiles, remove_stale_files
from mindvlm.checkpoint.mindspore_format import stream_mindspore
from mindvlm.checkpoint.safetensors_format import stream_safetensors
from mindvlm.checkpoint.source import TensorSource
from mindvlm.checkpoint.targets import Target, check_target, plan_target
from mindvlm.checkpoint.tensor_file import TensorFile
from mindvlm.checkpoint.torch_writing import stream_torch
from mindvlm.core.errors import UserError

_STREAMS = {".safetensors": stream_safetensors, ".ckpt": stream_mindspore, ".bin": stream_torch}


def write_checkpoint(
    path: str | Path,
    source: TensorSource,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, int], None] | None = None,
    max_shard_size: int | None = None,
) -> tuple[Path, ...]:
    """Write `source` to a `.safetensors`, MindSpore `.ckpt` or torch `.bin` file, or to shards; return the files, an
    index last.

    Tensors stream from the source: memory does not grow with them. All files appear together when all are complete,
    whatever interrupts the writing; then the files of an earlier write to the same target that have no successor of
    their name are removed. `targets.plan_target` says beforehand which files these are.

    Args:
        path: a name that ends in `.safetensors`, `.ckpt` or `.bin`, or a folder, which is created if its parent exists.
        source: the tensors.
        metadata: short texts kept in every file but a `.bin`.
        progress: called with tensor name and bytes written.
        max_shard_size: bytes of tensors per `.safetensors` file.

    Raises:
        UserError: another ending, an unwritable path, a full disk, or a source that cannot be read; the message names
            the tensor, nothing is left behind.
    """
    target = plan_target(path, source.infos, max_shard_size=max_shard_size)
    _check_names(path, source)
    made_folder = False
    try:
        check_target(target)
        if not target.folder.exists():
            target.folder.mkdir()
            made_folder = True
        remove_stale_files(target.folder, target.names)
        _write(target, source, metadata, progress)
    except BaseException as error:
        if made_folder:
            _remove_empty(target.folder)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was kept") from error
        raise
    return target.files


def _write(
    target: Target,
    source: TensorSource,
    metadata: Mapping[str, str] | None,
    progress: Callable[[str, int], None] | None,
) -> None:
    with PendingFiles() as files:
        files.remove(target.obsolete)
        for path, names in target.shards.items():
            with TensorFile(files, path) as file:
                _STREAMS[path.suffix](file, source, names, metadata=metadata, progress=progress)
        if target.index:
            with files.create(target.index) as file:
                file.write(_index(target, source))


def _index(target: Target, source: TensorSource) -> bytes:
    """The table of shards as Hugging Face writes it: sorted names, total bytes of the tensors."""
    total = sum(info.num_bytes for info in source.infos.values())
    places = {name: path.name for path, names in target.shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _check_names(path: str | Path, source: TensorSource) -> None:
    if not source.infos:
        raise UserError(f"{path}: there are no tensors to write; give a source that has some")
    for name in source.infos:
        if not name or not name.isprintable() or name == "__metadata__":
            raise UserError(f"{path}: a tensor cannot be stored under the name {name[:80]!r}; rename it in the source")


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass
