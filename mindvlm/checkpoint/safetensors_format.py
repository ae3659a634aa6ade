"""The safetensors format (https://github.com/huggingface/safetensors): an 8-byte length, a JSON header, the bytes.

The reader checks lengths, dtype names, offsets and overlaps against the size of the file before it reads any tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import PendingFiles
from mindvlm.checkpoint.dtypes import DTYPES, item_size
from mindvlm.checkpoint.source import TensorInfo, TensorSource
from mindvlm.checkpoint.stored import Contents, Segment, StoredTensor
from mindvlm.checkpoint.tensor_file import TensorFile
from mindvlm.checkpoint.untrusted import MAX_JSON_BYTES, check_info, parse_json_table, quoted
from mindvlm.core.errors import UserError

# F32, BF16, I64, U8, BOOL
_CODES = {dtype: dtype.replace("uint", "u").replace("int", "i").replace("float", "f").upper() for dtype in DTYPES}
_NAMES = {code: dtype for dtype, code in _CODES.items()}
_REMEDY = "the file is truncated or damaged, copy or download it again"


def read_safetensors(path: Path) -> Contents:
    """Reads the header of a safetensors file.

    Raises:
        UserError: the header is damaged or does not match the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > size - 8:
            raise UserError(f"{path}: not a complete safetensors file ({size} bytes); {_REMEDY}")
        if length > MAX_JSON_BYTES:
            raise UserError(f"{path}: its header claims {length} bytes, more than {MAX_JSON_BYTES}; {_REMEDY}")
        header = parse_json_table(path, file.read(length), what="its header", remedy=_REMEDY)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: the metadata in its header is not a table of texts; {_REMEDY}")
    begin = 8 + length
    tensors = [_stored(path, name, entry, begin) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.segments[0].offset, tensor.segments[0].num_bytes))
    expected = begin
    for tensor in tensors:
        segment = tensor.segments[0]
        if segment.offset != expected:
            problem = "overlaps another tensor" if segment.offset < expected else "leaves a gap before it"
            raise UserError(f"{path}: tensor {quoted(tensor.info.name)} {problem}; {_REMEDY}")
        expected += segment.num_bytes
    if expected != size:
        raise UserError(f"{path}: its header describes {expected} bytes, the file has {size}; {_REMEDY}")
    return Contents({tensor.info.name: tensor for tensor in tensors}, metadata)


def write_safetensors(
    path: str | Path,
    source: TensorSource,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes all tensors of `source` to one file; see `stream_safetensors`.

    Raises:
        UserError: the file cannot be written, or the source cannot be read; no file is left behind.
    """
    with PendingFiles() as files, TensorFile(files, Path(path), progress) as file:
        stream_safetensors(file, source, tuple(source.infos), metadata)


def stream_safetensors(
    file: TensorFile, source: TensorSource, names: Sequence[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the tensors `names` of `source` to `file`, chunk by chunk.

    Order and alignment are those of the safetensors library (large elements first, then by name).

    Raises:
        UserError: the header is larger than readers accept, the disk is full, or the source cannot be read.
    """
    infos = sorted((source.infos[name] for name in names), key=lambda info: (-item_size(info.dtype), info.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in infos:
        end = offset + info.num_bytes
        header[info.name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_JSON_BYTES:
        raise UserError(f"{file.path}: {len(infos)} tensors are too many for one file; write shards")
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for info in infos:
        file.write_tensor(source, info.name, 0, info.num_elements)


def _stored(path: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(code, str) or code not in _NAMES:
        raise UserError(
            f"{path}: tensor {quoted(name)} has dtype {quoted(code)}, readable are {', '.join(_NAMES)}; save it in one"
        )
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: tensor {quoted(name)} has no valid shape and offsets; {_REMEDY}")
    info = TensorInfo(name, _NAMES[code], tuple(shape))
    start, end = offsets
    check_info(path, info)
    if end < start or end - start != math.prod(shape) * item_size(info.dtype):
        raise UserError(
            f"{path}: tensor {quoted(name)} of shape {shape} and dtype {code} does not fit its bytes; {_REMEDY}"
        )
    return StoredTensor(info, (Segment(path, begin + start, end - start),))


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
