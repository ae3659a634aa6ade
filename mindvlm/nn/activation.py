"""Activations by their Hugging Face names, written out because the backend's GELU variants differ between devices."""

import functools

from mindspore import nn, ops


class GELU(nn.Cell):
    """x * (1 + erf(x / sqrt 2)) / 2, the exact form. Keeps its input alone for the way back."""

    def construct(self, x):
        return x * (0.5 + 0.5 * ops.erf(x * 0.7071067811865476))

    def bprop(self, x, out, dout):
        x = ops.depend(x, dout)
        density = 0.3989422804014327 * ops.exp(-0.5 * x * x)
        return (dout * (0.5 + 0.5 * ops.erf(x * 0.7071067811865476) + x * density),)


class TanhGELU(nn.Cell):
    """x * (1 + tanh(u)) / 2 for u = sqrt(2 / pi) (x + 0.044715 x^3), the approximation that GPT-2 was trained with.

    Written as x * sigmoid(2 u), which is the same: the CPU backend's tanh is off by 1e-5, its sigmoid by 2e-7.
    """

    def construct(self, x):
        return x * ops.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))

    def bprop(self, x, out, dout):
        x = ops.depend(x, dout)
        square = x * x
        sigmoid = ops.sigmoid(1.5957691216057308 * (x + 0.044715 * square * x))
        slope = 1.5957691216057308 * sigmoid * (1.0 - sigmoid) * (1.0 + 0.134145 * square)
        return (dout * (sigmoid + x * slope),)


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


class GatedSiLU(nn.Cell):
    """silu(gate) * up. Keeps these two alone for the way back."""

    def construct(self, gate, up):
        return gate * ops.sigmoid(gate) * up

    def bprop(self, gate, up, out, dout):
        gate = ops.depend(gate, dout)
        sigmoid = ops.sigmoid(gate)
        silu = gate * sigmoid
        return dout * up * (sigmoid + silu * (1.0 - sigmoid)), dout * silu


class Gated(nn.Cell):
    """activation(gate) * up."""

    def __init__(self, activation: nn.Cell):
        super().__init__()
        self.activation = activation

    def construct(self, gate, up):
        return self.activation(gate) * up


@functools.cache
def gated_activation(name: str) -> nn.Cell:
    """(gate, up) -> activation(gate) * up. One Cell for a name: it is compiled once and not once for every layer."""
    return GatedSiLU() if name == "silu" else Gated(activation(name))


@functools.cache
def activation(name: str) -> nn.Cell:
    """The one Cell of an activation."""
    return ACTIVATIONS[name]()


ACTIVATIONS = {
    "gelu": GELU,
    "quick_gelu": QuickGELU,
    "silu": SiLU,
    "relu": ReLU,
    "gelu_new": TanhGELU,
    "gelu_pytorch_tanh": TanhGELU,
}
