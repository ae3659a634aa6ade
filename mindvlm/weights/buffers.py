"""Small tensors that a model computes and some published files contain, kept as text for the way back.

Position ids and rotary frequencies have no use here, but the reverse conversion must restore them. A text entry of the
converted file holds them: a JSON table name -> [dtype, shape, base64 of the deflated bytes].
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable

import numpy as np

from mindvlm.checkpoint import DTYPES, RawTensor, TensorSource
from mindvlm.checkpoint.dtypes import item_size, storage_dtype

COMPUTED = "a buffer that the model computes"
"""Why a rule drops such a tensor."""

MAX_CHARACTERS = 12_000
_MAX_BYTES = 1 << 20
_MAX_AXES = 8


def pack_buffers(source: TensorSource, names: Iterable[str]) -> str:
    """Returns the tensors `names` of `source` as text, without those that would exceed `MAX_CHARACTERS`."""
    packed: dict[str, list] = {}
    for name in sorted(names):
        info = source.infos[name]
        if info.num_bytes > _MAX_BYTES or len(info.shape) > _MAX_AXES:
            continue
        data = base64.b64encode(zlib.compress(source.read(name).data.tobytes(), 9)).decode()
        entry = {name: [info.dtype, list(info.shape), data]}
        if len(json.dumps(packed | entry)) <= MAX_CHARACTERS:
            packed |= entry
    return json.dumps(packed) if packed else ""


def unpack_buffers(text: str) -> dict[str, RawTensor]:
    """Returns the tensors of such a text; none if it is damaged, since nothing depends on them."""
    try:
        entries = json.loads(text[: MAX_CHARACTERS + 1])
        return {str(name): _unpack(*entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, zlib.error):
        return {}


def _unpack(dtype: str, shape: list[int], data: str) -> RawTensor:
    if dtype not in DTYPES or len(shape) > _MAX_AXES or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("no tensor")
    num_bytes = math.prod(shape) * item_size(dtype)
    if num_bytes > _MAX_BYTES:
        raise ValueError("too large")
    content = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), num_bytes + 1)
    if len(content) != num_bytes:
        raise ValueError("another size")
    return RawTensor(dtype, tuple(shape), np.frombuffer(content, storage_dtype(dtype)).reshape(shape))
