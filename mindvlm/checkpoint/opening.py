"""Opens checkpoints: one file, a folder, or shards with the index that Hugging Face writes beside them.

The suffix of a file's name chooses the format.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from mindvlm.checkpoint.mindspore_format import read_mindspore
from mindvlm.checkpoint.safetensors_format import read_safetensors
from mindvlm.checkpoint.stored import Checkpoint, Contents, StoredTensor
from mindvlm.checkpoint.torch_reader import read_torch
from mindvlm.checkpoint.untrusted import MAX_JSON_BYTES, MAX_TENSORS, check_info, parse_json_table, quoted
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
_NOT_WEIGHTS = (
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "tokenizer.bin"),
    "optimizer.safetensors",
)
_ADAPTER = "adapter_model.safetensors"
# copies of tensors in the weights beside them
_PARTS = ("mm_projector.bin", "non_lora_trainables.bin")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint: `.safetensors`, torch `.bin/.pt/.pth`, MindSpore `.ckpt`, an index of shards, or a folder.

    Only headers are read; tensors are read on request. Nothing in the file is executed.

    Raises:
        UserError: the file is missing, unreadable, truncated, damaged, or of an unknown kind.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = find_weights(path)
        contents = read_index(path) if path.name.endswith(".index.json") else _read_file(path)
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
        raise UserError(f"{folder}: holds no weights; expected one of {', '.join(_STANDARD)} or a single weights file")
    if _ADAPTER in names:
        raise UserError(f"{folder}: holds an adapter, not a model; give the model's weights, and this as the adapter")
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(f"{folder}: holds {len(names)} weights files ({shown}) and no index; give one file, or the index")


def holds_weights(folder: Path) -> bool:
    """Returns whether a folder holds any file that `find_weights` may choose."""
    return any((folder / name).is_file() for name in _STANDARD) or bool(_weights_files(folder))


def _weights_files(folder: Path) -> list[str]:
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix in _ENDINGS and entry.name not in _NOT_WEIGHTS and not entry.name.startswith(".")
    )
    return [name for name in names if name not in _PARTS] or names


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
