"""PyTorch files (`.bin`, `.pt`, `.pth`), the zip format and the one before torch 1.6, without torch and without
executing the pickle inside.

The result is the location of each tensor in the file. Other objects, such as settings of a trainer, are ignored. Shared
storages, strides and offsets stay as they are: two names may refer to the same bytes. Source of the formats:
torch/serialization.py.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mindvlm.checkpoint.dtypes import DTYPES, item_size
from mindvlm.checkpoint.pickle_machine import Global, Machine, Opaque, PickleRefused
from mindvlm.checkpoint.source import TensorInfo
from mindvlm.checkpoint.stored import Contents, Segment, StoredTensor
from mindvlm.checkpoint.untrusted import quoted
from mindvlm.checkpoint.zip_directory import read_zip
from mindvlm.core.errors import UserError

STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
# Tensors of newer dtypes refer to untyped bytes and name their dtype themselves.
_KINDS = {**STORAGES, "torch.storage.UntypedStorage": "uint8"}
_DTYPES = {
    **{f"torch.{name}": name for name in DTYPES},
    "torch.double": "float64",
    "torch.float": "float32",
    "torch.half": "float16",
    "torch.long": "int64",
    "torch.int": "int32",
    "torch.short": "int16",
}
# Every other name in these modules is refused: a tensor could not be told from a setting.
_RESERVED = ("torch", "torch._utils", "torch._tensor", "torch.storage")
_OTHER_NAMES = {
    f"torch.{name}"
    for name in (
        *("Tensor", "dtype", "strided", "sparse_coo", "complex32", "complex64", "complex128", "cfloat", "cdouble"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "qint8", "quint8"),
    )
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 16 * 1024 * 1024
_MAX_REPEATED_BYTES = 64 * 1024 * 1024
_MAX_ITEMS = 500_000
_MAX_AXES = 32
_MAX_DEPTH = 16
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_OPTIMIZER = ("optimizer_state_dict", "param_groups", "optimizer_states", "optimizer")
_MAX_TABLES, _MAX_ENTRIES = 3, 32
_DAMAGED = "the file is truncated or damaged, copy or download it again"


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    num_elements: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> Contents:
    """Finds the tensors of a file that `torch.save` wrote; none in an empty table.

    The file holds a table of tensors, or a table with such a table under `state_dict`, `model`, `module` or
    `model_state_dict`, or under another key if there is only one. Entries that are not tensors, such as a step counter,
    are ignored.

    Raises:
        UserError: the file is truncated, damaged, not a torch file, or its pickle would run code.
    """
    pickled, segments = _read_pickle(path)
    table = _tensor_table(path, pickled)
    return Contents({name: _locate(path, name, tensor, segments) for name, tensor in table.items()})


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the entries of a table of settings that `torch.save` wrote, of any kind of dict.

    A dtype becomes its name. Values other than texts, numbers, lists and tables are left out.

    Raises:
        UserError: the file cannot be read, is damaged, holds no table, or its pickle would run code.
    """
    try:
        pickled, _ = _read_pickle(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions") from error
    if not isinstance(pickled, Opaque | dict):
        raise UserError(f"{path}: holds no table of settings; give the file that the training wrote")
    return _plain_entries(path, pickled, _MAX_DEPTH)


def _plain_entries(path: Path, table: Opaque | dict, depth: int) -> dict[str, Any]:
    if not depth:
        raise UserError(
            f"{path}: its tables lie more than {_MAX_DEPTH} deep in each other; give the file that the training wrote"
        )
    found = {}
    for key, value in _entries(table).items():
        if isinstance(value, Opaque) and value.entries or isinstance(value, dict):
            value = _plain_entries(path, value, depth - 1)
        elif isinstance(value, Global):
            value = value.name
        if isinstance(key, str) and (value is None or isinstance(value, str | int | float | list | dict)):
            found[key] = value
    return found


def _read_pickle(path: Path) -> tuple[Any, Mapping[str, Segment]]:
    """Returns the object in a file of `torch.save`, and the places of its storages."""
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(0)
        try:
            if head[:2] == b"PK":
                return _read_zip(path, file)
            if head[:1] == b"\x80":
                return _read_legacy(path, file)
        except PickleRefused as error:
            raise UserError(
                f"{path}: refused, it {error}; nothing was executed, save the plain state_dict or use safetensors"
            ) from error
    raise UserError(f"{path}: not a PyTorch file; give a .bin/.pt that torch.save wrote")


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, Mapping[str, Segment]]:
    located = read_zip(path, file)
    pickles = [name for name in located if name == "data.pkl" or name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip file, but not one of PyTorch weights; give a .bin/.pt that torch.save wrote")
    root = pickles[0].removesuffix("data.pkl")
    order = located.get(f"{root}byteorder")
    if order is not None and _bytes_of(file, order, 16) == b"big":
        raise UserError(f"{path}: was saved on a big-endian machine; save it again on a little-endian one")
    pickled = _run(io.BytesIO(_bytes_of(file, located[pickles[0]], _MAX_PICKLE_BYTES)))
    prefix = f"{root}data/"
    return pickled, {name.removeprefix(prefix): s for name, s in located.items() if name.startswith(prefix)}


def _bytes_of(file: BinaryIO, segment: Segment, limit: int) -> bytes:
    if segment.num_bytes > limit:
        raise PickleRefused(f"holds a pickle of {segment.num_bytes} bytes, more than {limit}")
    file.seek(segment.offset)
    return file.read(segment.num_bytes)


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, Mapping[str, Segment]]:
    if _run(file) != _LEGACY_MAGIC or _run(file) != _LEGACY_PROTOCOL:
        raise UserError(f"{path}: a pickle, but not one of PyTorch weights; give a .bin/.pt that torch.save wrote")
    system = _run(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError(f"{path}: was saved on a big-endian machine; save it again on a little-endian one")
    storages: dict[str, _Storage] = {}
    pickled = _run(file, storages)
    keys = _run(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise UserError(f"{path}: its list of storages does not match its tensors; {_DAMAGED}")
    size = path.stat().st_size
    segments: dict[str, Segment] = {}
    for key in keys:
        head = file.read(8)
        storage = storages[key]
        num_bytes = storage.num_elements * item_size(storage.dtype)
        offset = file.tell()
        if len(head) != 8 or struct.unpack("<q", head)[0] != storage.num_elements or offset + num_bytes > size:
            raise UserError(f"{path}: the storage {quoted(key)} is not complete; {_DAMAGED}")
        segments[key] = Segment(path, offset, num_bytes)
        file.seek(num_bytes, io.SEEK_CUR)
    return pickled, segments


def _run(file: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    def storage(identifier: Any) -> _Storage | Global:
        # the old format stores the class of a module with its source code
        if isinstance(identifier, tuple) and identifier[:1] == ("module",) and len(identifier) == 4:
            if not isinstance(identifier[1], Global):
                raise PickleRefused("holds a damaged pickle")
            return identifier[1]
        if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
            raise PickleRefused("refers to something that is not a storage")
        _, kind, key, _, num_elements = identifier[:5]
        if len(identifier) == 6 and identifier[5] is not None:
            raise PickleRefused("uses storage views of torch 0.1, load and save it with a newer torch")
        dtype = _KINDS.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or not isinstance(key, str) or not _is_count(num_elements):
            raise PickleRefused("refers to a storage of an unknown kind")
        found = _Storage(key, dtype, num_elements)
        if storages is not None and storages.setdefault(key, found) != found:
            raise PickleRefused(f"describes the storage {quoted(key)} in two ways")
        return found

    left = _MAX_ITEMS

    def table(items: Any = ()) -> dict[str, Any]:
        nonlocal left
        left -= len(items)
        if left < 0 or not all(type(item) in (list, tuple) and len(item) == 2 for item in items):
            raise PickleRefused("uses a table that is too large or damaged")
        entries: dict[str, Any] = {}
        machine.set_items(entries, [value for item in items for value in item])
        return entries

    def rebuild_subclass(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleRefused("describes a tensor in an unknown way")
        return machine.call(function.name, arguments)

    calls = {
        "collections.OrderedDict": table,
        "collections.defaultdict": lambda *_: {},
        "torch.Size": lambda *_: Opaque("torch.Size"),
        "torch.device": lambda *_: Opaque("torch.device"),
        "torch.serialization._get_layout": lambda *_: Opaque("torch.layout"),
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
        "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
        "torch._utils._rebuild_wrapper_subclass": _refuse_class,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    }
    known = {*_KINDS, *_DTYPES, *_OTHER_NAMES}
    machine = Machine(file, calls=calls, storage=storage, known=known, reserved=_RESERVED)
    return machine.run()


def _rebuild_tensor(
    storage: Any, first: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, flags: Any = None
) -> _Tensor:
    if flags:
        raise PickleRefused("holds a negated or conjugated view, save it with .resolve_neg().resolve_conj()")
    if not (isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise PickleRefused("describes a tensor in an unknown way")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES or not all(map(_is_count, (first, *shape, *strides))):
        raise PickleRefused("describes a tensor of impossible shape")
    return _Tensor(storage, first, shape, strides)


def _rebuild_untyped(
    storage: Any, first: Any, shape: Any, strides: Any, grad: Any, hooks: Any, kind: Any, flags: Any = None
) -> _Tensor:
    if not isinstance(kind, Global) or not isinstance(storage, _Storage):
        raise PickleRefused("describes a tensor in an unknown way")
    dtype = _DTYPES.get(kind.name)
    if dtype is None:
        raise PickleRefused(f"holds a tensor of dtype {quoted(kind.name)}, save it as torch.bfloat16")
    num_elements = storage.num_elements * item_size(storage.dtype) // item_size(dtype)
    return _rebuild_tensor(_Storage(storage.key, dtype, num_elements), first, shape, strides, grad, hooks, flags)


def _refuse_class(kind: Any = None, *_: Any) -> None:
    name = quoted(kind.name) if isinstance(kind, Global) else "an unknown class"
    raise PickleRefused(
        f"holds quantized or divided tensors of {name}, give the same model in float16, bfloat16 or float32"
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor_table(path: Path, pickled: Any) -> dict[str, _Tensor]:
    if pickled == {}:
        return {}
    found = _find_tensors(pickled, _MAX_TABLES)
    if not found:
        raise UserError(f"{path}: holds no table of named tensors but {_describe(pickled)}")
    return found


def _find_tensors(value: Any, depth: int) -> dict[str, _Tensor]:
    """Returns the tensors of the first table that has some: under a usual key, this one, or the only one inside it."""
    entries = _entries(value)
    if not depth or not entries:
        return {}
    # the inner table first: tensors beside it are training state, such as a step counter
    for key in _WRAPPERS:
        if key in entries and (found := _find_tensors(entries[key], depth - 1)):
            return found
    if found := {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, _Tensor)}:
        return found
    if len(entries) > _MAX_ENTRIES or "param_groups" in entries:
        return {}
    names = [key for key in entries if isinstance(key, str) and key not in _OPTIMIZER]
    others = [found for name in names if (found := _find_tensors(entries[name], depth - 1))]
    return others[0] if len(others) == 1 else {}


def _entries(value: Any) -> dict[Any, Any]:
    """Returns the entries of any kind of dict; none for another value."""
    if isinstance(value, Opaque):
        return value.entries
    return value if isinstance(value, dict) else {}


def _describe(pickled: Any) -> str:
    """Returns what a file without a table of tensors holds, and the remedy."""
    entries = _entries(pickled)
    if isinstance(pickled, Opaque) and not entries:
        return f"an object of the class {quoted(pickled.name)}; save model.state_dict()"
    if any(key in entries for key in _OPTIMIZER):
        return "the state of an optimizer; give the file of the model's weights"
    if any(entries.get(key) == {} for key in _WRAPPERS):
        return "an empty one; it was saved without weights, save model.state_dict() again"
    if entries:
        return f"one with {', '.join(map(quoted, list(entries)[:3]))}; save model.state_dict()"
    return f"a {type(pickled).__name__.strip('_').lower()}; save model.state_dict()"


def _locate(path: Path, name: str, tensor: _Tensor, segments: Mapping[str, Segment]) -> StoredTensor:
    storage = tensor.storage
    segment = segments.get(storage.key)
    size = item_size(storage.dtype)
    if segment is None or segment.num_bytes < storage.num_elements * size:
        raise UserError(f"{path}: the values of tensor {quoted(name)} are missing or too short; {_DAMAGED}")
    info = TensorInfo(name, storage.dtype, tensor.shape)
    if info.num_elements == 0:
        return StoredTensor(info, (Segment(path, segment.offset, 0),))
    last = tensor.first + sum((axis - 1) * stride for axis, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= storage.num_elements:
        raise UserError(
            f"{path}: tensor {quoted(name)} reaches beyond its {storage.num_elements} stored values; {_DAMAGED}"
        )
    if info.num_bytes > max(segment.num_bytes, _MAX_REPEATED_BYTES):
        raise UserError(
            f"{path}: tensor {quoted(name)} of shape {list(tensor.shape)} repeats {storage.num_elements} stored "
            f"values; save it with .contiguous()"
        )
    if _is_row_major(tensor):
        return StoredTensor(info, (Segment(path, segment.offset + tensor.first * size, info.num_bytes),))
    return StoredTensor(info, (segment,), tensor.strides, tensor.first)


def _is_row_major(tensor: _Tensor) -> bool:
    shape = tensor.shape
    return all(
        axis == 1 or stride == math.prod(shape[index + 1 :])
        for index, (axis, stride) in enumerate(zip(shape, tensor.strides, strict=True))
    )
