"""Writes checkpoints: one file whose suffix chooses the format, or shards with the index that Hugging Face reads.

`plan_target` lists the files before anything is written; they appear together when all are complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mindvlm.checkpoint.atomic import PendingFiles, check_writable, output_folder, remove_stale_files
from mindvlm.checkpoint.mindspore_format import stream_mindspore
from mindvlm.checkpoint.opening import read_weight_map
from mindvlm.checkpoint.safetensors_format import stream_safetensors
from mindvlm.checkpoint.source import TensorInfo, TensorSource
from mindvlm.checkpoint.tensor_file import TensorFile
from mindvlm.checkpoint.torch_writer import stream_torch
from mindvlm.core.errors import UserError

_STREAMS = {".safetensors": stream_safetensors, ".ckpt": stream_mindspore, ".bin": stream_torch, ".pt": stream_torch}
WRITABLE_ENDINGS = tuple(_STREAMS)
_FOLDER_STEM = "model"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MAX_SHARDS = 99_999


def write_checkpoint(
    path: str | Path,
    source: TensorSource,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, int], None] | None = None,
    max_shard_size: int | None = None,
) -> tuple[Path, ...]:
    """Writes `source` to a `.safetensors`, MindSpore `.ckpt` or torch `.bin` file, or to shards.

    Tensors stream from the source, so memory does not grow with their size. All files appear together when all are
    complete; then the files of an earlier write to the same target that were not replaced are removed.
    `plan_target` lists these files beforehand.

    Args:
        path: a name that ends in `.safetensors`, `.ckpt` or `.bin`, or a folder, which is created if its parent exists.
        metadata: text entries for every file; a `.bin` has none.
        progress: called with the name of a tensor and the bytes just written.
        max_shard_size: bytes of tensors per `.safetensors` file.

    Returns:
        The files, an index last.

    Raises:
        UserError: an unknown suffix, an unwritable path, a full disk, or a source that cannot be read. The message
            names the tensor, and no file is left behind.
    """
    target = plan_target(path, source.infos, max_shard_size=max_shard_size)
    _check_names(path, source)
    with output_folder(target.folder, path):
        check_target(target)
        target.folder.mkdir(exist_ok=True)
        remove_stale_files(target.folder, target.names)
        with PendingFiles() as files:
            files.remove(target.obsolete)
            for shard, names in target.shards.items():
                with TensorFile(files, shard, progress) as file:
                    _STREAMS[shard.suffix](file, source, names, metadata)
            if target.index:
                with files.create(target.index) as file:
                    file.write(_index(target, source))
    return target.files


def _index(target: Target, source: TensorSource) -> bytes:
    """Returns the index as Hugging Face writes it: sorted names, total bytes of the tensors."""
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


def bytes_bar(source: TensorSource, label: str, *, show: bool) -> tqdm:
    """Returns a progress bar on stderr over the bytes of all tensors of `source`; closing removes it."""
    total = sum(info.num_bytes for info in source.infos.values())
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not show, leave=False)


@dataclass(frozen=True)
class Target:
    """The plan of a write; making one touches no file.

    Attributes:
        shards: each file of tensors with the names it holds, in order.
        index: the index beside several shards; None for one file.
        obsolete: files of an earlier write to the same target that the new files replace under other names.
        whole_folder: the target is a folder, which is created if missing.
        names: matches the names of all files that any write to this target could create.
    """

    shards: Mapping[Path, tuple[str, ...]]
    index: Path | None
    obsolete: tuple[Path, ...]
    whole_folder: bool
    names: re.Pattern[str]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files to write, the index last."""
        return (*self.shards, self.index) if self.index else tuple(self.shards)

    @property
    def folder(self) -> Path:
        return next(iter(self.shards)).parent


def plan_target(path: str | Path, infos: Mapping[str, TensorInfo], *, max_shard_size: int | None = None) -> Target:
    """Plans the files that a write to `path` creates.

    A name that ends in `.safetensors`, `.ckpt` or `.bin` is one file. A folder, existing or named without a suffix,
    gets `model.safetensors`. With `max_shard_size` (bytes of tensors) a NAME.safetensors that would be larger becomes
    NAME-00001-of-0000N.safetensors and so on with NAME.safetensors.index.json: tensors in the order of `infos`, each
    shard filled until the next tensor does not fit; a tensor larger than the limit has a shard alone.

    Raises:
        UserError: another suffix, shards of another kind than `.safetensors`, a limit below 1.
    """
    path = Path(path)
    check_ending(path)
    if max_shard_size is not None and max_shard_size < 1:
        raise UserError(f"max_shard_size {max_shard_size}: must be at least 1 byte; give a size such as 5GB")
    if path.suffix in (".ckpt", ".bin", ".pt"):
        if max_shard_size is not None:
            raise UserError(
                f"{path}: a {path.suffix} is always one file; leave max_shard_size out or write .safetensors"
            )
        return Target({path: tuple(infos)}, None, (), False, re.compile(re.escape(path.name)))
    single = path if path.suffix == ".safetensors" else path / f"{_FOLDER_STEM}.safetensors"
    groups = _fill_shards(infos, max_shard_size)
    if len(groups) > _MAX_SHARDS:
        raise UserError(f"{path}: max_shard_size {max_shard_size} makes {len(groups)} files; choose a larger one")
    index = single.with_name(f"{single.name}.index.json")
    if len(groups) == 1:
        files, written_index = [single], None
    else:
        numbers = range(1, len(groups) + 1)
        files = [single.with_name(f"{single.stem}-{n:05d}-of-{len(groups):05d}.safetensors") for n in numbers]
        written_index = index
    stem = re.escape(single.stem)
    names = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors|{stem}\.safetensors\.index\.json")
    written = {*files, written_index}
    obsolete = tuple(file for file in _earlier_files(single, index, names) if file not in written)
    return Target(dict(zip(files, groups, strict=True)), written_index, obsolete, single != path, names)


def check_target(target: Target) -> None:
    """Raises UserError unless all files of a target could be created or replaced; creates nothing."""
    folder = target.folder
    if not target.whole_folder or folder.is_dir():
        for file in target.files:
            check_writable(file)
    elif folder.exists():
        raise UserError(f"{folder}: is a file; end the name with {' or '.join(WRITABLE_ENDINGS)} to replace a file")
    else:
        check_writable(folder)


def check_ending(path: str | Path) -> None:
    """Raises UserError unless checkpoints can be written to a file or folder of this name."""
    path = Path(path)
    if path.suffix in WRITABLE_ENDINGS or not path.suffix or path.is_dir():
        return
    raise UserError(
        f"{path}: cannot write this kind of file; end the name with {' or '.join(WRITABLE_ENDINGS)}, or give a folder"
    )


def parse_size(text: str | int) -> int:
    """Returns the bytes of a size such as "2GB", "500 MB", "1.5GiB" or "1000000" (KB is 1000 bytes, KiB is 1024).

    Raises:
        UserError: anything else, and sizes below one byte.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", str(text).strip(), re.ASCII)
    factor = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if match and factor and "." not in match[1]:
        size = int(match[1]) * factor
    if size < 1:
        raise UserError(f"{str(text)!r} is not a size; expected a number of bytes, or one such as 500MB, 2GB or 1GiB")
    return size


def _fill_shards(infos: Mapping[str, TensorInfo], limit: int | None) -> list[tuple[str, ...]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if limit is not None and groups[-1] and filled + info.num_bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.num_bytes
    return [tuple(group) for group in groups]


def _earlier_files(single: Path, index: Path, names: re.Pattern[str]) -> list[Path]:
    """Returns the files of an earlier write: the single file, the index, and the shards it lists for this target."""
    found = [file for file in (single, index) if file.is_file()]
    if index.is_file():
        try:
            shards = dict.fromkeys(read_weight_map(index).values())
        except (UserError, OSError):
            return found
        found += [index.with_name(shard) for shard in shards if names.fullmatch(shard)]
    return [file for file in dict.fromkeys(found) if file.is_file()]
