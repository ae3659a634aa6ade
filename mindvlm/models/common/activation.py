"""Activations by their Hugging Face names, written out because the backend's GELU variants differ between devices."""

from mindspore import nn, ops


class GELU(nn.Cell):
    """x * (1 + erf(x / sqrt 2)) / 2, the exact form."""

    def construct(self, x):
        return x * (0.5 + 0.5 * ops.erf(x * 0.7071067811865476))


class QuickGELU(nn.Cell):
    """x * sigmoid(1.702 x), as CLIP was trained with."""

    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


class SiLU(nn.Cell):
    """x * sigmoid(x)."""

    def construct(self, x):
        return x * ops.sigmoid(x)


class ReLU(nn.Cell):
    """max(x, 0)."""

    def construct(self, x):
        return ops.relu(x)


ACTIVATIONS = {"gelu": GELU, "quick_gelu": QuickGELU, "silu": SiLU, "relu": ReLU}
