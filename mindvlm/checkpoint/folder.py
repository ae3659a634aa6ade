"""A folder as a checkpoint: one weights file, or shards with the index that Hugging Face writes beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from mindvlm.checkpoint.json_table import MAX_JSON_BYTES, parse_json_table
from mindvlm.checkpoint.stored import Contents, StoredTensor, quoted
from mindvlm.core.errors import UserError

_STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = (
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "tokenizer.bin"),
    "optimizer.safetensors",
)
_ADAPTER = "adapter_model.safetensors"
# copies of what the weights beside them hold
_PARTS = ("mm_projector.bin", "non_lora_trainables.bin")


def find_weights(folder: Path) -> Path:
    """Return the weights file of a folder, or the index of its shards.

    The four standard Hugging Face names come first; otherwise the one file with a weights ending, beside which a
    MindSpore .ckpt may lie, and parts under the names that the LLaVA programs give them.

    Raises:
        UserError: there is none, or several and no index says how they belong together.
    """
    for name in _STANDARD:
        if (folder / name).is_file():
            return folder / name
    names = _weights_files(folder)
    # a .ckpt may have been made here from the other file
    originals = [name for name in names if not name.endswith(".ckpt")]
    if len(names) == 1 or len(originals) == 1:
        return folder / (originals or names)[0]
    if not names:
        raise UserError(f"{folder}: holds no weights; expected one of {', '.join(_STANDARD)} or a single weights file")
    if _ADAPTER in names:
        raise UserError(f"{folder}: holds an adapter and no whole model; give the model's weights, and this as adapter")
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(f"{folder}: holds {len(names)} weights files ({shown}) and no index; give one file, or the index")


def holds_weights(folder: Path) -> bool:
    """Whether there is anything in a folder that `find_weights` may choose."""
    return any((folder / name).is_file() for name in _STANDARD) or bool(_weights_files(folder))


def _weights_files(folder: Path) -> list[str]:
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix in _ENDINGS and entry.name not in _NOT_WEIGHTS and not entry.name.startswith(".")
    )
    return [name for name in names if name not in _PARTS] or names


def read_index(path: Path, read_file: Callable[[Path], Contents]) -> Contents:
    """Read an index and the headers of all shards that it names; texts on which the shards agree become metadata.

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
        contents = read_file(file)
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
    """Return which shard holds which tensor; the shards are plain names of files.

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
        raise UserError(f"{path}: has no weight_map that says which shard holds which tensor; download it again")
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
