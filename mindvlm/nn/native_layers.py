"""Norms, activations, projections, feed-forward blocks and convolutions on the C++ kernels, without gradients.

N images, I input channels, P patch size.
"""

import numpy as np
from mindspore import Tensor, nn

from mindvlm.native.library import Library
from mindvlm.nn.native_operator import first_shape, operator

ACTIVATION_KERNELS = ("none", "gelu", "tanh_gelu", "quick_gelu", "silu", "relu")
"""Names of the kernels in the order of `Activation` in native/src/towers.h."""


class NativeRMSNorm(nn.Cell):
    """Computes `RMSNorm`: x (N, hidden), weight (hidden,) -> (N, hidden)."""

    def __init__(self, library: Library, eps: float):
        super().__init__()
        self.norm = operator(library, "MindvlmRmsNorm", first_shape)
        self.eps = Tensor(np.array([eps], np.float32))

    def construct(self, x, weight):
        return self.norm(x, weight, self.eps)


class NativeLayerNorm(nn.Cell):
    """Computes `LayerNorm`: x (..., hidden), weight and bias (hidden,) -> the shape of x."""

    def __init__(self, library: Library, eps: float):
        super().__init__()
        self.norm = operator(library, "MindvlmLayerNorm", first_shape)
        self.eps = Tensor(np.array([eps], np.float32))

    def construct(self, x, weight, bias):
        return self.norm(x, weight, bias, self.eps)


class NativeActivation(nn.Cell):
    """Computes an `Activation`: x -> the shape of x."""

    def __init__(self, library: Library, kernel: str):
        super().__init__()
        self.apply = operator(library, "MindvlmActivation", first_shape)
        self.kind = activation_kind(kernel)

    def construct(self, x):
        return self.apply(x, self.kind)


def activation_kind(kernel: str) -> Tensor:
    """Returns the number of an activation for operators, (1,) int32."""
    return Tensor(np.array([ACTIVATION_KERNELS.index(kernel)], np.int32))


class NativeGatedSiLU(nn.Cell):
    """silu(gate) * up."""

    def __init__(self, library: Library):
        super().__init__()
        self.multiply = operator(library, "MindvlmGatedSilu", first_shape)

    def construct(self, gate, up):
        return self.multiply(gate, up)


class NativeLinear(nn.Cell):
    """Computes `Linear`: x (..., in_features), the handle of its product, and its bias if it has one."""

    def __init__(self, library: Library, num_outputs: int):
        super().__init__()
        self.multiply = operator(library, "MindvlmProducts", lambda x, *_: [*x[:-1], num_outputs], num_outputs)

    def construct(self, x, *matrix):
        return self.multiply(x, *matrix)


class JointProducts(nn.Cell):
    """Products of one input in one operator.

    Args:
        num_outputs: output features of each.
    """

    def __init__(self, library: Library, num_outputs: tuple[int, ...]):
        super().__init__()
        self.multiply = operator(
            library,
            "MindvlmProducts",
            lambda x, *_: tuple([*x[:-1], count] for count in num_outputs),
            num_outputs,
            len(num_outputs),
        )

    def construct(self, x, *matrices):
        """x (..., in_features), the handles of all products, then their biases or nothing -> tuple of outputs."""
        return self.multiply(x, *matrices)


class NativePlainMLP(nn.Cell):
    """Computes `PlainMLP`: x (..., hidden_size), the handles of both Linears, then their biases or nothing."""

    def __init__(self, library: Library, kernel: str, num_outputs: int):
        super().__init__()
        self.run = operator(library, "MindvlmMlp", lambda x, *_: [*x[:-1], num_outputs], num_outputs)
        self.kind = activation_kind(kernel)

    def construct(self, x, first, second, *biases):
        return self.run(x, first, second, self.kind, *biases)


class NativeDense(nn.Cell):
    """A product with a weight that MindSpore holds: x (..., I), weight (O, ...), bias (O,) or none -> (..., O)."""

    def __init__(self, library: Library):
        super().__init__()
        self.multiply = operator(library, "MindvlmDense", lambda x, weight, *_: [*x[:-1], weight[0]])

    def construct(self, x, weight, *bias):
        return self.multiply(x, weight, *bias)


class NativePatchConv(nn.Cell):
    """Computes `PatchConv`: x (N, I, height, width), weight (O, I, P, P), bias (O,) or none -> (N * patches, O)."""

    def __init__(self, library: Library, size: int):
        super().__init__()
        self.gather = operator(
            library, "MindvlmPatches", lambda x, _: [x[0] * (x[2] // size) * (x[3] // size), x[1] * size * size], size
        )
        self.size = Tensor(np.array([size], np.int32))
        self.product = NativeDense(library)

    def construct(self, x, weight, *bias):
        return self.product(self.gather(x, self.size), weight, *bias)


class NativeConv3x3(nn.Cell):
    """Computes `Conv3x3`: x (N, rows, columns, I), weight (O, I, 3, 3) -> (N * output rows * output columns, O)."""

    def __init__(self, library: Library, stride: int):
        super().__init__()
        self.gather = operator(
            library,
            "MindvlmNeighbourhoods",
            lambda x, _: [x[0] * -(-x[1] // stride) * -(-x[2] // stride), 9 * x[3]],
            stride,
        )
        self.stride = Tensor(np.array([stride], np.int32))
        self.product = NativeDense(library)

    def construct(self, x, weight):
        return self.product(self.gather(x, self.stride), weight)
