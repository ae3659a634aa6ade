"""Writes PyTorch's zip format without torch, for programs that read files such as `mm_projector.bin`.

Source of the format: torch/serialization.py.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from mindvlm.checkpoint.source import TensorInfo, TensorSource
from mindvlm.checkpoint.tensor_file import TensorFile
from mindvlm.checkpoint.torch_reader import STORAGES

_KINDS = {dtype: name for name, dtype in STORAGES.items()}
_ROOT = "archive"


def stream_torch(
    file: TensorFile, source: TensorSource, names: Sequence[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the tensors `names` of `source` to `file` so that `torch.load` gives a table of them, chunk by chunk.

    The format has no place for `metadata`.

    Raises:
        UserError: the disk is full, or the source cannot be read.
    """
    infos = [source.infos[name] for name in names]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/data.pkl"), _pickled_table(infos))
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/byteorder"), "little")
        for number, info in enumerate(infos):
            with archive.open(zipfile.ZipInfo(f"{_ROOT}/data/{number}"), "w", force_zip64=True) as entry:
                file.write_tensor(source, info.name, 0, info.num_elements, write=entry.write)
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/version"), "3\n")


def _pickled_table(infos: Sequence[TensorInfo]) -> bytes:
    """Returns the pickle that `torch.save` makes of an OrderedDict of tensors, assembled by hand: it names torch's
    classes, and torch may be missing."""
    table = _global("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO + b"\x02", table, pickle.MARK]
    for number, info in enumerate(infos):
        strides = tuple(math.prod(info.shape[axis + 1 :]) for axis in range(len(info.shape)))
        # newer dtypes have no typed storage: untyped bytes, and the dtype by name
        is_typed = info.dtype in _KINDS
        kind = _global(_KINDS[info.dtype] if is_typed else "torch.storage.UntypedStorage")
        size = info.num_elements if is_typed else info.num_bytes
        storage = [_plain("storage"), kind, _plain(str(number)), _plain("cpu"), _plain(size)]
        parts += [
            _plain(info.name),
            _global(f"torch._utils._rebuild_tensor_v{2 if is_typed else 3}"),
            pickle.MARK,
            *(pickle.MARK, *storage, pickle.TUPLE, pickle.BINPERSID),
            *map(_plain, (0, info.shape, strides, False)),
            table,
            b"" if is_typed else _global(f"torch.{info.dtype}"),
            pickle.TUPLE + pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _global(name: str) -> bytes:
    """Returns the operation that pushes a class, a function or a dtype."""
    module, _, attribute = name.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _plain(value: Any) -> bytes:
    """Returns the operations that push a text, a number or a tuple of numbers."""
    return pickle.dumps(value, protocol=2)[2:-1]
