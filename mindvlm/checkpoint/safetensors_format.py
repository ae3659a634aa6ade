"""The safetensors format (https://github.com/huggingface/safetensors): an 8-byte length, a JSON header, the bytes.

The reader checks lengths, dtype names, offsets and overlaps against the size of the file before it reads any tensor.

The format has no quantized dtypes. A tensor (O, I) of blocks is stored as uint8 (O, bytes of a row), and the text entry
`mindvlm_quantization` is a JSON table of its format and shape:

    {"version": 1, "tensors": {NAME: {"format": "q4_0", "block": 32, "shape": [O, I]}}}
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import PendingFiles
from mindvlm.checkpoint.dtypes import DTYPES, item_size
from mindvlm.checkpoint.source import TensorInfo, TensorSource, storage_shape
from mindvlm.checkpoint.stored import Contents, Segment, StoredTensor
from mindvlm.checkpoint.tensor_file import TensorFile
from mindvlm.checkpoint.untrusted import MAX_JSON_BYTES, check_info, parse_json_table, quoted
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import DIVISORS, Block, find_block

# F32, BF16, I64, U8, BOOL
_CODES = {dtype: dtype.replace("uint", "u").replace("int", "i").replace("float", "f").upper() for dtype in DTYPES}
_NAMES = {code: dtype for dtype, code in _CODES.items()}
QUANTIZATION_KEY, QUANTIZATION_VERSION = "mindvlm_quantization", 1
_MAX_WIDTH = 1 << 30
"""Of a row that is a block, which NumPy must have a dtype for."""
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
    quantized = metadata.pop(QUANTIZATION_KEY, None)
    if quantized is not None:
        shown = _quantized_infos(path, quantized)
        tensors = [_with_blocks(path, tensor, shown.get(tensor.info.name)) for tensor in tensors]
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
    infos = sorted((source.infos[name] for name in names), key=lambda info: (-_alignment(info.dtype), info.name))
    texts = dict(metadata or {})
    if quantized := {info.name: _block_entry(info) for info in infos if find_block(info.dtype)}:
        texts[QUANTIZATION_KEY] = json.dumps({"version": QUANTIZATION_VERSION, "tensors": quantized})
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    offset = 0
    for info in infos:
        end = offset + info.num_bytes
        code = _CODES.get(info.dtype, "U8")
        header[info.name] = {"dtype": code, "shape": list(_bytes_shape(info)), "data_offsets": [offset, end]}
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


def _alignment(dtype: str) -> int:
    return 1 if find_block(dtype) else item_size(dtype)


def _bytes_shape(info: TensorInfo) -> tuple[int, ...]:
    """Returns the shape in the header: that of the bytes for a block format."""
    if not find_block(info.dtype):
        return info.shape
    *rows, num_blocks = storage_shape(info.dtype, info.shape)
    return (*rows, num_blocks * item_size(info.dtype))


def _block_entry(info: TensorInfo) -> dict[str, Any]:
    block = find_block(info.dtype)
    return {"format": block.format, "block": block.size, "shape": list(info.shape)}


def _quantized_infos(path: Path, text: str) -> dict[str, TensorInfo]:
    """Returns the quantized tensors that a text entry describes.

    Raises:
        UserError: the entry is damaged, or of a version or format that does not exist.
    """
    table = parse_json_table(path, text.encode(), what=f"its entry {QUANTIZATION_KEY}", remedy=_REMEDY)
    if table.get("version") != QUANTIZATION_VERSION:
        raise UserError(
            f"{path}: its quantization has version {quoted(table.get('version'))}, readable is {QUANTIZATION_VERSION}; "
            "quantize the original weights again, or update mindvlm"
        )
    tensors = table.get("tensors")
    infos = {}
    for name, entry in (tensors if isinstance(tensors, dict) else {}).items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, size, shape = fields.get("format"), fields.get("block"), fields.get("shape")
        if not isinstance(dtype, str) or dtype not in DIVISORS:
            raise UserError(
                f"{path}: tensor {quoted(name)} has the format {quoted(dtype)}, readable are "
                f"{', '.join(DIVISORS)}; quantize the original weights again, or update mindvlm"
            )
        dtype = f"q8_c[{size}]" if dtype == "q8_c" else dtype
        block = find_block(dtype)
        if not block or block.size != size or not _is_counts(shape) or not shape or not _fits(block, shape[-1]):
            raise UserError(f"{path}: tensor {quoted(name)} has no valid shape and block; {_REMEDY}")
        infos[name] = TensorInfo(name, dtype, tuple(shape))
    return infos


def _fits(block: Block, width: int) -> bool:
    if block.format == "q8_c":
        return width == block.size and 0 < width < _MAX_WIDTH
    return width % block.size == 0


def _with_blocks(path: Path, tensor: StoredTensor, info: TensorInfo | None) -> StoredTensor:
    if info is None:
        return tensor
    check_info(path, info)
    if tensor.info.dtype != "uint8" or tensor.info.shape != _bytes_shape(info):
        raise UserError(
            f"{path}: tensor {quoted(info.name)} is {tensor.info.dtype} {list(tensor.info.shape)}, not {info.dtype} of "
            f"shape {list(info.shape)}; {_REMEDY}"
        )
    return replace(tensor, info=info)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
