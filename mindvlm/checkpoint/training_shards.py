"""Joins the files `model_tp{t}_pp{p}.pt` of InternLM's trainer: tensor shards t of pipeline stages p.

Every stage numbers its blocks from 0. The tensor shards of a weight are joined as InternLM's parallel layers divide it:

    query, key, value   each by heads: the three thirds of the rows of every shard
    column parallel     by rows
    row parallel        by columns; the bias is in shard 0 only
    norms, VQGAN        equal in all shards; the first one is read

The input projection is joined by rows if every shard has its share of them. The trainer's default gives every shard all
rows, and gathers more states than the model has: this is refused, as is a divided tensor of any other name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mindvlm.checkpoint.stored import Contents, Segment, StoredTensor
from mindvlm.core.errors import UserError

Shards = Mapping[tuple[int, int], Path]
"""Files by (tensor shard, pipeline stage)."""

_FILE = re.compile(r"model_tp(\d{1,4})_pp(\d{1,4})(\.pt|\.safetensors)")
_BLOCK = re.compile(r"((?:model\.)?blocks\.)(\d{1,6})(\..+)")
_NORM = re.compile(r"(model\.)?(blocks\.\d+\.)?norm[12]?\.(weight|bias)")
_VQGAN = re.compile(r"(model\.)?embedding\.vq_model\..+")
_QKV = re.compile(r".*\.mixer\.Wqkv\.(weight|bias)")
_ROWS = re.compile(r".*\.mlp\.(w1|w2|fc1)\.(weight|bias)|(model\.)?head\.weight")
_COLUMNS = re.compile(r".*\.(mixer\.out_proj|mlp\.(w3|fc2))\.weight")
_FIRST_ONLY = re.compile(r".*\.(mixer\.out_proj|mlp\.fc2)\.bias")
_HEAD = re.compile(r"(model\.)?head\.weight")
_PROJECTION = re.compile(r"(model\.)?embedding\.embed_proj\.weight")


def find_shards(path: Path) -> Shards:
    """Returns the shards in a folder, or those beside a file that is one of them; none if there are none.

    Raises:
        UserError: a shard is missing, or there twice.
    """
    folder = path if path.is_dir() else path.parent
    if folder is not path and not (_FILE.fullmatch(path.name) and path.is_file()):
        return {}
    found: dict[tuple[int, int], Path] = {}
    for file in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(file.name):
            other = found.setdefault((int(match[1]), int(match[2])), file)
            if other is not file:
                raise UserError(f"{folder}: holds {other.name} and {file.name}, the same shard twice; remove one")
    for t in range(1 + max((t for t, _ in found), default=-1)):
        for p in range(1 + max(p for _, p in found)):
            if (t, p) not in found:
                raise UserError(
                    f"{folder}: holds {len(found)} shards of a training but not model_tp{t}_pp{p}.pt; copy all shards"
                )
    return found


def read_shards(shards: Shards, read: Callable[[Path], Contents]) -> Contents:
    """Returns the tensors of all shards as those of one model.

    Args:
        shards: the files.
        read: reads one file.

    Raises:
        UserError: a file cannot be read, or the shards of a tensor cannot be joined; the message names the tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    num_blocks, num_shards = 0, 1 + max(t for t, _ in shards)
    for stage in range(1 + max(p for _, p in shards)):
        files = [shards[t, stage] for t in range(num_shards)]
        parts = [read(file).tensors for file in files]
        names = dict.fromkeys(name for part in parts for name in part)
        blocks = {int(match[2]) for name in names if (match := _BLOCK.fullmatch(name))}
        if blocks and blocks != set(range(len(blocks))):
            raise UserError(
                f"{files[0]}: has the blocks {min(blocks)} to {max(blocks)}, {len(blocks)} in all; expected 0 to "
                f"{len(blocks) - 1}, as the trainer numbers those of each stage; give the files that it wrote"
            )
        # norms are not divided
        norms = (tensor.info for name, tensor in parts[0].items() if _NORM.fullmatch(name))
        hidden_size = next((info.num_elements for info in norms), 0)
        for name in names:
            match = _BLOCK.fullmatch(name)
            whole = f"{match[1]}{int(match[2]) + num_blocks}{match[3]}" if match else name
            if whole in tensors:
                raise UserError(f"{files[0]}: tensor {name} is in an earlier stage too; give the files of one training")
            joined = _join(files, name, [part[name] for part in parts if name in part], num_shards, hidden_size)
            tensors[whole] = replace(joined, info=replace(joined.info, name=whole))
        num_blocks += len(blocks)
    if num_blocks and not any(_HEAD.fullmatch(name) for name in names):
        raise UserError(
            f"{files[0]}: has no head.weight, which the last pipeline stage has; copy the shards of all stages"
        )
    return Contents(tensors)


def _join(files: list[Path], name: str, shards: list[StoredTensor], num_shards: int, hidden_size: int) -> StoredTensor:
    """Returns a tensor joined from its shards, of which some may be missing."""
    first = shards[0]
    if num_shards == 1:
        return first
    if _FIRST_ONLY.fullmatch(name) and len(shards) == 1:
        return first
    infos = [shard.info for shard in shards]
    shape, dtype = first.info.shape, first.info.dtype
    if len(shards) != num_shards or any((one.shape, one.dtype) != (shape, dtype) for one in infos):
        shown = ", ".join(f"{one.dtype} {list(one.shape)}" for one in infos)
        raise UserError(
            f"{files[0].parent}: tensor {name} is in {len(shards)} of {num_shards} tensor shards ({shown}); expected "
            "one shape in all of them; give the files of one training"
        )
    if _NORM.fullmatch(name) or _VQGAN.fullmatch(name):
        return first
    if any(shard.strides is not None for shard in shards):
        raise UserError(f"{files[0].parent}: tensor {name} is not contiguous in its shards; save it with .contiguous()")
    if _QKV.fullmatch(name) and shape and shape[0] % 3 == 0:
        return _interleaved(shards, (num_shards * shape[0], *shape[1:]), 3)
    is_share = _PROJECTION.fullmatch(name) and shape[:1] == (hidden_size / num_shards,)
    if is_share or shape and _ROWS.fullmatch(name):
        return _interleaved(shards, (num_shards * shape[0], *shape[1:]), 1)
    if _COLUMNS.fullmatch(name) and len(shape) == 2 and shape[0]:
        return _interleaved(shards, (shape[0], num_shards * shape[1]), shape[0])
    raise UserError(
        f"{files[0].parent}: tensor {name} of shape {list(shape)} is in {num_shards} tensor shards, and how they form "
        "one tensor is not defined; train or save with tensor parallel size 1"
    )


def _interleaved(shards: list[StoredTensor], shape: tuple[int, ...], num_runs: int) -> StoredTensor:
    """Returns the tensor that has the first of `num_runs` equal runs of every shard, then the second ones, ..."""
    size = shards[0].info.num_bytes // num_runs
    starts = [shard.segments[0] for shard in shards]
    segments = tuple(
        Segment(start.path, start.offset + number * size, size) for number in range(num_runs) for start in starts
    )
    return StoredTensor(replace(shards[0].info, shape=shape), segments)
