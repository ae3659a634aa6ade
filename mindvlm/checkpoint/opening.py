"""Opens checkpoints: one file, a folder, or shards with the index that Hugging Face writes beside them.

The suffix of a file's name chooses the format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from mindvlm.checkpoint.mindspore_format import read_mindspore
from mindvlm.checkpoint.safetensors_format import read_safetensors
from mindvlm.checkpoint.stored import Checkpoint, Contents, StoredTensor
from mindvlm.checkpoint.torch_reader import read_torch
from mindvlm.checkpoint.training_shards import find_shards, read_shards
from mindvlm.checkpoint.untrusted import (
    MAX_JSON_BYTES,
    MAX_TENSORS,
    check_info,
    parse_json_table,
    quoted,
    refuse_lfs_pointer,
)
from mindvlm.core.errors import UserError

_READERS = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_mindspore,
}

_STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ENDINGS = tuple(_READERS)
_NOT_WEIGHTS = re.compile(
    r"(training_args|tokenizer)\.bin|optimizer.*\.(pt|bin|safetensors)|(scheduler|scaler)\.pt|rng_state.*\.pth"
    r"|.*_optim_states\.pt|zero_pp_rank_.*_model_states\.pt"
)
_SHARDED = (
    (r"zero_to_fp32\.py|global_step\d+|.*_optim_states\.pt|zero_pp_rank_.*_model_states\.pt", "a DeepSpeed ZeRO",
     "python zero_to_fp32.py . whole.bin"),
    (r".*\.distcp", "an FSDP", "accelerate merge-weights . whole"),
    (r"pytorch_model_fsdp_\d+", "an FSDP", "accelerate merge-weights {} whole"),
)  # fmt: skip
"""File name -> the program that divides weights over such files, and the command that joins them."""
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# copies of tensors in the weights beside them
_PARTS = tuple(
    f"{name}{ending}"
    for name in ("mm_projector", "sampler", "non_lora_trainables")
    for ending in (".bin", ".safetensors")
)
# sub-folders of a model that is saved in parts, and the one without which there is no model
PART_FOLDERS = ("language_model", "vision_tower", "connector")


def open_checkpoint(
    path: str | Path, *, require_finite: bool = False, may_be_empty: bool = False, mapped: bool = False
) -> Checkpoint:
    """Opens a checkpoint: `.safetensors`, torch `.bin/.pt/.pth`, MindSpore `.ckpt`, an index of shards, or a folder.

    A folder may hold the weights in sub-folders, as TinyLLaVA Factory saves them: language_model, vision_tower and
    connector. The names then begin with that of the sub-folder. Or it holds the shards of InternLM's trainer, see
    training_shards.py; one of them stands for all.

    Only headers are read; tensors are read on request. Nothing in the file is executed.

    Args:
        path: the file or folder.
        require_finite: raise NonFiniteError when NaN or infinity is read.
        may_be_empty: accept a file without tensors.
        mapped: map large tensors instead of copying them, see `Checkpoint`.

    Raises:
        UserError: the file is missing, unreadable, truncated, damaged, or of an unknown kind.
    """
    path = Path(os.path.expanduser(path))
    try:
        shards = find_shards(path)
        folders = [] if shards else part_folders(path)
        if shards:
            path = path if len(shards) == 1 or path.is_dir() else path.parent
            contents = read_shards(shards, _read_file)
        elif folders:
            contents = _read_parts(folders)
        else:
            path = find_weights(path) if path.is_dir() else path
            contents = _read_weights(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and permissions"
        ) from error
    if not contents.tensors and not may_be_empty:
        raise UserError(f"{path}: holds no tensors; it was saved without weights, give another file or save it again")
    return Checkpoint(path, contents, require_finite=require_finite, mapped=mapped)


def part_folders(path: Path) -> list[Path]:
    """Returns the sub-folders that hold the parts of a model; none if its own weights lie in the folder."""
    if not path.is_dir() or any(name not in _ADAPTERS and name not in _PARTS for name in _weights_files(path)):
        return []
    folders = [path / name for name in PART_FOLDERS if (path / name).is_dir() and holds_weights(path / name)]
    return folders if path / PART_FOLDERS[0] in folders else []


def _read_parts(folders: list[Path]) -> Contents:
    tensors = {}
    for folder in folders:
        for name, tensor in _read_weights(find_weights(folder)).tensors.items():
            whole = f"{folder.name}.{name}"
            tensors[whole] = replace(tensor, info=replace(tensor.info, name=whole))
    return Contents(tensors)


def _read_weights(path: Path) -> Contents:
    return read_index(path) if path.name.endswith(".index.json") else _read_file(path)


def _read_file(path: Path) -> Contents:
    reader = _READERS.get(path.suffix)
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    _refuse_sharded(path, [path.name])
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; give a file of weights or a folder")
    with open(path, "rb") as file:
        _refuse_other_kind(path, file.read(12))
    if reader is None:
        known = ", ".join((*_READERS, ".index.json"))
        raise UserError(f"{path}: unknown kind of checkpoint {path.suffix!r}; expected one of {known}, or a folder")
    contents = reader(path)
    if len(contents.tensors) > MAX_TENSORS:
        raise UserError(
            f"{path}: holds more than {MAX_TENSORS} tensors; the file is damaged, copy or download it again"
        )
    for tensor in contents.tensors.values():
        check_info(path, tensor.info)
    return contents


def find_weights(folder: Path) -> Path:
    """Returns the weights file of a folder, or the index of its shards.

    The four standard Hugging Face names come first; otherwise the only file with a weights suffix. A MindSpore .ckpt,
    and parts under LLaVA's names, may lie beside it.

    Raises:
        UserError: there is none, or there are several and no index.
    """
    for name in _STANDARD:
        if (folder / name).is_file():
            return folder / name
    names = _weights_files(folder)
    # the .ckpt may have been converted from the other file
    originals = [name for name in names if not name.endswith(".ckpt")]
    if len(names) == 1 or len(originals) == 1:
        return folder / (originals or names)[0]
    if not names:
        _refuse_sharded(folder, [entry.name for entry in folder.iterdir()])
        parts = {name: folder / name for name in PART_FOLDERS if (folder / name).is_dir()}
        found = [name for name, part in parts.items() if holds_weights(part)]
        if found:
            given = [str(parts[name]) if name in found else name.upper() for name in PART_FOLDERS]
            raise UserError(
                f"{folder}: holds only {', '.join(found)} of a model in parts, without {PART_FOLDERS[0]}; join them "
                f"with the others: mindvlm-convert --torch_ckpt_path {' '.join(given)} --to hf --mindspore_ckpt_path "
                "FOLDER"
            )
        raise UserError(f"{folder}: holds no weights; expected one of {', '.join(_STANDARD)} or a single weights file")
    if set(names) & set(_ADAPTERS):
        raise UserError(
            f"{folder}: holds an adapter, not a model; give its base, and this with --adapter or --merge_lora"
        )
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(f"{folder}: holds {len(names)} weights files ({shown}) and no index; give one file, or the index")


def holds_weights(folder: Path) -> bool:
    """Returns whether a folder holds any file that `find_weights` may choose."""
    return any((folder / name).is_file() for name in _STANDARD) or bool(_weights_files(folder) or part_folders(folder))


def _weights_files(folder: Path) -> list[str]:
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix in _ENDINGS and not _NOT_WEIGHTS.fullmatch(entry.name) and not entry.name.startswith(".")
    )
    return [name for name in names if name not in _PARTS] or names


def _refuse_other_kind(path: Path, head: bytes) -> None:
    """Raises UserError if the first 12 bytes of a file show that it is of another kind than its name says."""
    refuse_lfs_pointer(path, head)
    reader = _READERS.get(path.suffix)
    if head[:4] == b"GGUF":
        raise UserError(f"{path}: a GGUF file, quantized for llama.cpp; give the original weights of the model")
    if head.lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: an HTML page, such as a failed download leaves; download the file again")
    if head[:4] == b"PK\x03\x04" and reader is not read_torch:
        raise UserError(f"{path}: a zip file, such as torch.save writes; rename it to {path.stem}.pt")
    if head[6:10] == b'\0\0{"' and reader is not read_safetensors:
        raise UserError(f"{path}: a safetensors file; rename it to {path.stem}.safetensors")


def _refuse_sharded(path: Path, names: Sequence[str]) -> None:
    """Raises UserError if a file of these names holds a part of weights that a training program divided."""
    whole = sorted(path.glob("global_step*/mp_rank_00_model_states.pt"), key=lambda file: file.stat().st_mtime)
    instead = f", or {whole[-1]} with its 16-bit weights" if whole else ""
    for pattern, program, command in _SHARDED:
        if found := next((name for name in names if re.fullmatch(pattern, name)), None):
            raise UserError(
                f"{path}: belongs to {program} checkpoint, which divides the weights over files; run "
                f"`{command.format(found)}` in the folder of the checkpoint, and give the result{instead}"
            )


def read_index(path: Path) -> Contents:
    """Reads an index and the headers of its shards; text entries that all shards agree on become metadata.

    Raises:
        UserError: the index is damaged, names a file outside its folder or a missing shard, or disagrees with a shard.
    """
    weight_map = read_weight_map(path)
    shards: dict[str, dict[str, StoredTensor]] = {}
    texts: dict[str, set[str]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = path.parent / shard
        if not file.is_file():
            raise UserError(
                f"{path}: names the shard {quoted(shard)}, which is not in the folder; download the missing file"
            )
        contents = _read_file(file)
        shards[shard] = dict(contents.tensors)
        for key, text in contents.metadata.items():
            texts.setdefault(key, set()).add(text)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(
                f"{path}: says that tensor {quoted(name)} is in {quoted(shard)}, but it is not; download both again"
            )
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{path}: does not list tensor {quoted(name)} of the shard {quoted(shard)}; download both again"
                )
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    return Contents(tensors, {key: next(iter(found)) for key, found in texts.items() if len(found) == 1})


def read_weight_map(path: Path) -> dict[str, str]:
    """Returns the shard of each tensor, by name; shards are plain file names.

    Raises:
        UserError: the index is damaged or names a file outside its folder.
    """
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; give the index of the shards")
    with open(path, "rb") as file:
        encoded = file.read(MAX_JSON_BYTES + 1)
    index = parse_json_table(path, encoded, what="the index", remedy="download it again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map from tensors to shards; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise UserError(
                f"{path}: puts tensor {quoted(name)} into {quoted(shard)}; shards must be files in the same folder"
            )
        if not shard.endswith(_ENDINGS):
            raise UserError(
                f"{path}: puts tensor {quoted(name)} into {quoted(shard)}; expected one of {', '.join(_ENDINGS)}"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return (
        bool(name)
        and name not in (".", "..")
        and name.isprintable()
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )
