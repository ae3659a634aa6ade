"""Storage forms of weight matrices, with their products.

N rows, O output features, I input features.
"""

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.checkpoint import RawTensor
from mindvlm.checkpoint.dtypes import overflows
from mindvlm.core.errors import UserError
from mindvlm.nn.layout import read_with

ReadRows = Callable[[int, int], RawTensor]
"""Reads rows [start, stop) of one stored tensor, in the stored dtype."""


class WeightProduct(nn.Cell):
    """Base of the storage forms of a weight matrix W (O, I).

    A subclass defines `load`, `construct`, `rows` and `matrix`, and holds W in its Parameters. Only those of a
    `DenseProduct` are trained.

    Attributes:
        shape: (O, I).
        dtype: dtype of the activations.
    """

    def __init__(self, shape: tuple[int, int], dtype):
        super().__init__()
        self.shape = shape
        self.dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Size of W in bytes once it is loaded."""
        return sum(parameter.nbytes for parameter in self.get_parameters(expand=False))

    def load(self, read: ReadRows) -> None:
        """Fills W from the stored tensor (O, I); may read and pack it block by block.

        Raises:
            UserError: W cannot hold the stored values.
        """
        raise NotImplementedError

    def construct(self, x):
        """Returns x W^T: (N, I) -> (N, O)."""
        raise NotImplementedError

    def rows(self, ids):
        """Returns W[ids]: (...) int32 -> (..., I)."""
        raise NotImplementedError

    def matrix(self, x):
        """Returns W (O, I) in the dtype of x, for a computation with x."""
        raise NotImplementedError


class DenseProduct(WeightProduct):
    """W in one Parameter `weight`.

    Uses `MatMul(transpose_b=True)`, the only fast weight product of the CPU backend.
    """

    def __init__(self, shape: tuple[int, int], dtype):
        super().__init__(shape, dtype)
        self.weight = Parameter(initializer("zeros", shape, dtype), name="weight")
        self.matmul = ops.MatMul(transpose_b=True)

    def load(self, read: ReadRows) -> None:
        load_parameter(self.weight, read)

    def construct(self, x):
        return self.matmul(x, read_with(self.weight, x))

    def rows(self, ids):
        return ops.gather(self.weight, ids, 0)

    def matrix(self, x):
        return read_with(self.weight, x)


class Float16Product(DenseProduct):
    """W in float16, widened to the activations' dtype for each computation. For weights that do not train."""

    def __init__(self, shape: tuple[int, int], dtype):
        super().__init__(shape, ms.float16)
        self.dtype = dtype

    def construct(self, x):
        return self.matmul(x, self.matrix(x))

    def rows(self, ids):
        return super().rows(ids).astype(self.dtype)

    def matrix(self, x):
        return super().matrix(x).astype(x.dtype)


def load_parameter(parameter: Parameter, read: ReadRows) -> None:
    """Fills a Parameter from a stored tensor of its shape; `generation.memory.loading_bytes` counts the peak.

    Raises:
        UserError: a value is out of range of the Parameter's dtype.
    """
    num_rows = parameter.shape[0] if parameter.shape else 1
    # passed without a name, so that a cast frees it
    parameter.set_data(to_tensor(parameter.name, read(0, num_rows), parameter.dtype))


def to_tensor(name: str, raw: RawTensor, dtype) -> Tensor:
    """Converts a stored tensor to a MindSpore dtype. A float32 or float16 Tensor shares the memory of an array of that
    dtype. A bfloat16 Tensor is cast from float32, because numpy has no bfloat16.

    Raises:
        UserError: a finite value is out of range of float16.
    """
    if dtype == ms.float16:
        narrow = raw.cast("float16")
        if overflows(raw.data, raw.dtype, narrow.data, narrow.dtype):
            raise UserError(f"tensor {name} has values beyond float16; set dtype: bfloat16 or float32")
        raw = narrow
    elif dtype in (ms.float32, ms.bfloat16):
        raw = raw.cast("float32")
    # a parameter needs memory of its own: a mapped file cannot be written
    tensor = Tensor.from_numpy(np.require(raw.data, requirements=("C", "W")))
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
