"""Where a checkpoint is written: one file, or shards and the index that Hugging Face's loaders read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mindvlm.checkpoint.atomic import check_writable
from mindvlm.checkpoint.folder import read_weight_map
from mindvlm.checkpoint.source import TensorInfo
from mindvlm.core.errors import UserError

WRITABLE_ENDINGS = (".safetensors", ".ckpt", ".bin")
_FOLDER_STEM = "model"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MAX_SHARDS = 99_999


@dataclass(frozen=True)
class Target:
    """What a write will do; making one touches nothing.

    Attributes:
        shards: each file of tensors with the names that go into it, in order.
        index: the index beside several shards; None for one file.
        obsolete: files of an earlier write to the same target that the new ones replace under other names.
        whole_folder: whether the target is a folder, which is created when it is not there.
        names: matches the names of all files that any write to this target could make.
    """

    shards: Mapping[Path, tuple[str, ...]]
    index: Path | None
    obsolete: tuple[Path, ...]
    whole_folder: bool
    names: re.Pattern[str]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that will be written, the index last."""
        return (*self.shards, self.index) if self.index else tuple(self.shards)

    @property
    def folder(self) -> Path:
        return next(iter(self.shards)).parent


def plan_target(path: str | Path, infos: Mapping[str, TensorInfo], *, max_shard_size: int | None = None) -> Target:
    """Decide which files a write to `path` makes.

    A name that ends in `.safetensors`, `.ckpt` or `.bin` is one file. A folder, existing or named without an ending,
    gets `model.safetensors`. With `max_shard_size` (bytes of tensors) a NAME.safetensors that would be larger becomes
    NAME-00001-of-0000N.safetensors and so on with NAME.safetensors.index.json: tensors in the order of `infos`, each
    shard filled until the next tensor does not fit; a tensor larger than the limit has a shard alone.

    Raises:
        UserError: another ending, shards of another kind than `.safetensors`, a limit below 1.
    """
    path = Path(path)
    check_ending(path)
    if max_shard_size is not None and max_shard_size < 1:
        raise UserError(f"max_shard_size {max_shard_size}: must be at least 1 byte; give a size such as 5GB")
    if path.suffix in (".ckpt", ".bin"):
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
    """Raise UserError unless all files of a target could be created or replaced; creates nothing."""
    folder = target.folder
    if not target.whole_folder or folder.is_dir():
        for file in target.files:
            check_writable(file)
    elif folder.exists():
        raise UserError(f"{folder}: is a file; end the name with {' or '.join(WRITABLE_ENDINGS)} to replace a file")
    else:
        check_writable(folder)


def check_ending(path: str | Path) -> None:
    """Raise UserError unless checkpoints can be written to a file or folder of this name."""
    path = Path(path)
    if path.suffix in WRITABLE_ENDINGS or not path.suffix or path.is_dir():
        return
    raise UserError(
        f"{path}: cannot write this kind of file; end the name with {' or '.join(WRITABLE_ENDINGS)}, or give a folder"
    )


def parse_size(text: str | int) -> int:
    """Return the bytes of a size such as "2GB", "500 MB", "1.5GiB" or "1000000" (KB is 1000 bytes, KiB is 1024).

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
    """Files of an earlier write: the single file, the index, and the shards that it lists under this target's name."""
    found = [file for file in (single, index) if file.is_file()]
    if index.is_file():
        try:
            shards = dict.fromkeys(read_weight_map(index).values())
        except (UserError, OSError):
            return found
        found += [index.with_name(shard) for shard in shards if names.fullmatch(shard)]
    return [file for file in dict.fromkeys(found) if file.is_file()]
