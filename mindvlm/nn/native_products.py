"""Weight products on the C++ kernels: 16-bit weights as they are stored, and int8 or int4 blocks.

N rows, O output features, I input features.
"""

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindvlm.checkpoint import RawTensor, TensorInfo
from mindvlm.checkpoint.blocks import bytes_of
from mindvlm.checkpoint.dtypes import overflows
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import BLOCK_FORMATS, PATTERNS, blocks_for, find_block, parse_weights, part_of
from mindvlm.native.library import Library, Matrix, are_off, open_library
from mindvlm.nn.linear_plan import ProductRule
from mindvlm.nn.native_operator import operator
from mindvlm.nn.products import DenseProduct, ReadRows, WeightProduct

WeightFormat = Literal["auto", "16bit", "int8", "int8c", "int4", "int4k"]
MAX_READ_BYTES = 64 << 20
"""Size of the float32 rows that are quantized at a time."""


class NativeProduct(WeightProduct):
    """W outside of MindSpore's memory, in a `Matrix` of the library of kernels.

    Sums are float32. With blocks, every 32 values of x are rounded to int8.

    Args:
        library: the kernels.
        weight_format: see `mindvlm.core.weight_formats`. For blocks, I must be a multiple of 32.
    """

    def __init__(self, shape: tuple[int, int], dtype, *, library: Library, weight_format: WeightFormat):
        super().__init__(shape, dtype)
        self.library = library
        self.weight_format = weight_format
        self.stored: Matrix | None = None
        # a Parameter, because a constant would tie a compiled graph to an address
        self.handle = Parameter(Tensor(np.zeros(1, np.int64)), name="handle", requires_grad=False)
        num_outputs, width = shape
        self.multiply = operator(library, "MindvlmProducts", lambda x, _: [*x[:-1], num_outputs], num_outputs)
        self.look_up = operator(library, "MindvlmRows", lambda ids, _: [*ids, width], width)

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes if self.stored else 0

    def load(self, read: ReadRows) -> None:
        kept = kept_dtype(read(0, 0).dtype)
        blocks = blocks_for(self.weight_format, self.shape[1])
        dtype = blocks or (kept if self.weight_format == "auto" else "16bit")
        if find_block(dtype):
            self.stored = self.read_blocks(read, dtype)
        else:
            raw = read(0, self.shape[0])
            raw = rounded_to_16_bits(raw) if dtype == "16bit" else raw.cast(dtype)
            self.stored = Matrix.of_floats(self.library, np.ascontiguousarray(raw.data), raw.dtype)
        self.handle.set_data(Tensor(np.array([self.stored.handle], np.int64)))

    def read_blocks(self, read: ReadRows, dtype: str) -> Matrix:
        """Returns W as blocks, read or quantized part by part."""
        num_rows, width = self.shape
        matrix = Matrix.of_blocks(self.library, dtype, self.shape)
        step = max(1, MAX_READ_BYTES // (4 * width * matrix.row_step)) * matrix.row_step
        for first in range(0, num_rows, step):
            raw = read(first, min(first + step, num_rows))
            is_stored = raw.dtype == dtype
            matrix.pack(first, bytes_of(raw.data) if is_stored else self.library.quantize(raw.to_float32(), dtype))
        return matrix

    def construct(self, x):
        return self.multiply(x, self.handle)

    def rows(self, ids):
        return self.look_up(ids, self.handle)

    def matrix(self, x):
        return self.look_up(ops.arange(self.shape[0]).astype(ms.int32), self.handle)


def kept_dtype(stored: str) -> str:
    """Returns the dtype of a matrix whose values have the dtype `stored` in the checkpoint."""
    return stored if stored in ("float16", "bfloat16") or find_block(stored) else "float32"


def rounded_to_16_bits(raw: RawTensor) -> RawTensor:
    """Returns values as 16-bit ones: those of the checkpoint, or float16, or bfloat16 for what exceeds its range."""
    if raw.dtype in ("float16", "bfloat16"):
        return raw
    raw = RawTensor("float32", raw.shape, raw.to_float32())
    narrow = raw.cast("float16")
    return raw.cast("bfloat16") if overflows(raw.data, raw.dtype, narrow.data, narrow.dtype) else narrow


def native_rules(text: str, device: str) -> tuple[ProductRule, ...]:
    """Returns the rules for the key `weights`; none if all products are dense.

    Without kernels, weights are float32. A warning says so, that of `open_library` or another one, unless they would be
    anyway.

    Args:
        text: the value of the key.
        device: "CPU" or "Ascend".

    Raises:
        UserError: the device is no CPU.
    """
    formats = parse_weights(text)
    if set(formats.values()) == {"float32"} or (device != "CPU" and set(formats.values()) == {"auto"}):
        return ()
    if device != "CPU":
        raise UserError(f"weights is {text!r} but the device is {device}; leave it out, it is for a CPU")
    library = open_library()
    if library is None:
        if are_off() and set(formats.values()) - {"auto", "float32"}:
            warnings.warn(f"weights is {text!r} but native kernels are off; weights are float32", stacklevel=2)
        return ()
    return tuple(
        ProductRule(pattern, functools.partial(native_product, library=library, weight_format=formats[part]))
        for part, pattern in PATTERNS.items()
    )


def check_stored_blocks(text: str, infos: Iterable[TensorInfo], origin: str | Path) -> None:
    """Refuses to round quantized weights a second time.

    Args:
        text: the value of the key `weights`.
        infos: the stored tensors under native names.
        origin: name of the checkpoint in the message.

    Raises:
        UserError: a matrix is stored in blocks of another format than its part has.
    """
    formats = parse_weights(text)
    for info in infos:
        part = part_of(info.name, info.shape)
        wanted = blocks_for(formats[part], info.shape[1]) if part else None
        if wanted and find_block(info.dtype) and info.dtype != wanted:
            raise UserError(
                f"weights is {text!r} but {origin} holds {info.name} in {info.dtype}, which would be rounded a second "
                "time; leave weights out, or quantize the original weights"
            )


def native_product(shape: tuple[int, int], dtype, *, library: Library, weight_format: str) -> WeightProduct:
    """Returns the product for a matrix (O, I): blocks only where I is a multiple of 32, else 16-bit values."""
    if weight_format == "float32":
        return DenseProduct(shape, dtype)
    if weight_format in BLOCK_FORMATS and not blocks_for(weight_format, shape[1]):
        weight_format = "16bit"
    return NativeProduct(shape, dtype, library=library, weight_format=weight_format)
