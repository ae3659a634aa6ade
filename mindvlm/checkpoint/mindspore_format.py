"""The MindSpore `.ckpt` format: a protobuf message, read and written as a stream without MindSpore or protobuf.

    Checkpoint { repeated Value value = 1 }
    Value      { string tag = 1; TensorProto tensor = 2 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

A tensor larger than a slice is stored as consecutive values with one tag, each with the full dims and a run of the
bytes. An optional tail "crc_num" + 10 bytes follows (mindspore/train/serialization.py, checkpoint.proto).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from mindvlm.checkpoint.dtypes import DTYPES, item_size
from mindvlm.checkpoint.source import TensorInfo, TensorSource
from mindvlm.checkpoint.stored import Contents, Segment, StoredTensor
from mindvlm.checkpoint.tensor_file import TensorFile
from mindvlm.checkpoint.untrusted import check_info, quoted
from mindvlm.core.errors import UserError


def _code(dtype: str) -> str:
    """Returns MindSpore's name of a dtype: Float32, BFloat16, UInt8, Bool."""
    spaced = dtype.replace("int", "Int").replace("float", "Float")
    return spaced[0].upper() + spaced[1:]


_CODES = {dtype: _code(dtype) for dtype in DTYPES}
_NAMES = {code: dtype for dtype, code in _CODES.items()}
_SLICE_BYTES = 512 * 1024 * 1024
_MAX_TEXT_BYTES = 64 * 1024
_MAX_ALL_TEXTS_BYTES = 16 * 1024 * 1024
_MAX_FIELDS = 400_000
_MAX_DIMS = 32
_CRC_TAIL_BYTES = 17
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_mindspore(path: Path) -> Contents:
    """Finds the tensors of a `.ckpt` file; text entries become metadata.

    Raises:
        UserError: the file is truncated, encrypted or damaged, or holds a map tensor, which has no dense values.
    """
    size = path.stat().st_size
    infos: dict[str, TensorInfo] = {}
    segments: dict[str, list[Segment]] = {}
    metadata: dict[str, str] = {}
    text_bytes = 0
    last = None
    with open(path, "rb") as file:
        reader = _WireReader(path, file)
        size -= reader.tail_bytes(size)
        position = 0
        while position < size:
            field, start, end = reader.field(position, size)
            position = end
            if field != 1:
                raise reader.damaged("holds an unknown entry")
            tag, code, dims, content = _read_value(reader, start, end)
            if code == "str":
                text_bytes += content.num_bytes
                if text_bytes > _MAX_ALL_TEXTS_BYTES:
                    raise reader.damaged("holds too many texts")
                metadata[tag] = _read_text(reader, content)
                continue
            if code not in _NAMES:
                raise UserError(
                    f"{path}: tensor {quoted(tag)} has type {quoted(code)}; readable are {', '.join(_NAMES)}"
                )
            info = TensorInfo(tag, _NAMES[code], dims)
            check_info(path, info)
            if infos.setdefault(tag, info) != info or tag in segments and tag != last:
                raise reader.damaged(f"holds tensor {quoted(tag)} twice")
            segments.setdefault(tag, []).append(content)
            last = tag
    checked = {tag: _check_size(path, StoredTensor(info, tuple(segments[tag]))) for tag, info in infos.items()}
    return Contents(checked, metadata)


def stream_mindspore(
    file: TensorFile, source: TensorSource, names: Sequence[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the tensors `names` of `source` to `file` so that `mindspore.load_checkpoint` reads them, chunk by chunk.

    `metadata` is stored as text entries.

    Raises:
        UserError: the disk is full, or the source cannot be read.
    """
    for name in names:
        info = source.infos[name]
        step = _SLICE_BYTES // item_size(info.dtype)
        for start in range(0, max(info.num_elements, 1), step):
            stop = min(start + step, info.num_elements)
            head = _tensor_head(info.shape, _CODES[info.dtype])
            file.write(_message_head(_text_field(1, name), head, (stop - start) * item_size(info.dtype)))
            file.write_tensor(source, name, start, stop)
    for key, text in (metadata or {}).items():
        if not text:  # mindspore.load_checkpoint fails on empty ones
            continue
        encoded = text.encode("utf-32-le")
        file.write(_message_head(_text_field(1, key), _tensor_head((0,), "str"), len(encoded)) + encoded)


class _WireReader:
    """Protobuf fields at file positions; every length is checked against the bytes that are left."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self._file = file
        self._fields_left = _MAX_FIELDS

    def damaged(self, problem: str) -> UserError:
        return UserError(
            f"{self.path}: {problem}; the file is truncated, encrypted or not a MindSpore checkpoint, copy it again"
        )

    def tail_bytes(self, size: int) -> int:
        if size < _CRC_TAIL_BYTES:
            return 0
        return _CRC_TAIL_BYTES if self.bytes_at(size - _CRC_TAIL_BYTES, 7) == b"crc_num" else 0

    def bytes_at(self, position: int, count: int) -> bytes:
        self._file.seek(position)
        data = self._file.read(count)
        if len(data) != count:
            raise self.damaged("ends too early")
        return data

    def varint(self, position: int, limit: int) -> tuple[int, int]:
        """Returns the value and the position behind it."""
        data = self.bytes_at(position, min(10, limit - position))
        value = 0
        for index, byte in enumerate(data):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, position + index + 1
        raise self.damaged("holds a broken number")

    def field(self, position: int, limit: int) -> tuple[int, int, int]:
        """Returns a field's number and where its payload starts and ends (for a varint: the varint itself)."""
        self._fields_left -= 1
        if self._fields_left < 0:
            raise self.damaged(f"holds more than {_MAX_FIELDS} fields")
        key, position = self.varint(position, limit)
        kind = key & 7
        if kind == _VARINT:
            return key >> 3, position, self.varint(position, limit)[1]
        if kind == _BYTES:
            length, position = self.varint(position, limit)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(kind, limit)
        if length > limit - position:
            raise self.damaged("ends too early")
        return key >> 3, position, position + length

    def text(self, start: int, end: int) -> str:
        if end - start > _MAX_TEXT_BYTES:
            raise self.damaged(f"holds a name of {end - start} bytes")
        try:
            return self.bytes_at(start, end - start).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("holds a name that is not text") from error


def _read_value(reader: _WireReader, start: int, end: int) -> tuple[str, str, tuple[int, ...], Segment]:
    """Returns tag, tensor type, dims and content of one Value message."""
    tag, tensor = None, None
    while start < end:
        field, begin, start = reader.field(start, end)
        if field == 1:
            tag = reader.text(begin, start)
        elif field == 2:
            tensor = (begin, start)
        elif field == 3:
            raise UserError(f"{reader.path}: holds a MapTensor, which has no dense values; save it without")
    if tag is None or tensor is None:
        raise reader.damaged("holds an entry without a name or values")
    code, content = None, None
    dims: list[int] = []
    position, limit = tensor
    while position < limit:
        field, begin, position = reader.field(position, limit)
        if field == 1:
            dims.append(reader.varint(begin, position)[0])
            if len(dims) > _MAX_DIMS or dims[-1] >= 1 << 62:
                raise reader.damaged(f"holds an impossible shape for tensor {quoted(tag)}")
        elif field == 2:
            code = reader.text(begin, position)
        elif field == 3:
            content = Segment(reader.path, begin, position - begin)
    if code is None or content is None:
        raise reader.damaged(f"holds tensor {quoted(tag)} without a type or values")
    return tag, code, tuple(dims), content


def _read_text(reader: _WireReader, content: Segment) -> str:
    if content.num_bytes > _MAX_TEXT_BYTES:
        raise reader.damaged("holds an overlong text")
    try:
        return reader.bytes_at(content.offset, content.num_bytes).decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise reader.damaged("holds a broken text") from error


def _check_size(path: Path, stored: StoredTensor) -> StoredTensor:
    num_bytes = sum(segment.num_bytes for segment in stored.segments)
    info = stored.info
    if info.shape == (0,) and num_bytes == item_size(info.dtype):
        return StoredTensor(TensorInfo(info.name, info.dtype, ()), stored.segments)
    if num_bytes != info.num_bytes:
        raise UserError(
            f"{path}: tensor {quoted(info.name)} of shape {list(info.shape)} needs {info.num_bytes} bytes but has "
            f"{num_bytes}; the file is damaged, copy it again"
        )
    return stored


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _text_field(number: int, text: str) -> bytes:
    encoded = text.encode()
    return bytes([number << 3 | _BYTES]) + _varint(len(encoded)) + encoded


def _tensor_head(dims: tuple[int, ...], code: str) -> bytes:
    return b"".join(b"\x08" + _varint(dim) for dim in dims) + _text_field(2, code)


def _message_head(tag: bytes, tensor_head: bytes, content_bytes: int) -> bytes:
    """Returns a Checkpoint message with one value up to the first byte of the content."""
    tensor = tensor_head + b"\x1a" + _varint(content_bytes)
    value = tag + b"\x12" + _varint(len(tensor) + content_bytes) + tensor
    return b"\x0a" + _varint(len(value) + content_bytes) + value
