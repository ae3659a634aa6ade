"""Feed-forward blocks and their activations.

Activations have their Hugging Face names and explicit formulas, because GELU variants differ between backends.
"""

import functools

import mindspore as ms
from mindspore import nn, ops

from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.linear import Linear, matrices


class Activation(nn.Cell):
    """An elementwise function, shared by models.

    Attributes:
        kernel: its name in `mindvlm.nn.native_layers.ACTIVATION_KERNELS`.
    """

    kernel: str

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.activation(self.kernel)


class GELU(Activation):
    """x * (1 + erf(x / sqrt 2)) / 2, the exact form. Saves only its input for the backward pass."""

    kernel = "gelu"

    def construct(self, x):
        return x * (0.5 + 0.5 * ops.erf(x * 0.7071067811865476))

    def bprop(self, x, out, dout):
        x = ops.depend(x, dout)
        density = 0.3989422804014327 * ops.exp(-0.5 * x * x)
        return (dout * (0.5 + 0.5 * ops.erf(x * 0.7071067811865476) + x * density),)


class TanhGELU(Activation):
    """x * (1 + tanh(u)) / 2 for u = sqrt(2 / pi) (x + 0.044715 x^3), the tanh approximation of GPT-2.

    Computed as the equivalent x * sigmoid(2 u): the CPU backend's tanh has an error of 1e-5, its sigmoid one of 2e-7.
    """

    kernel = "tanh_gelu"

    def construct(self, x):
        return x * ops.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))

    def bprop(self, x, out, dout):
        x = ops.depend(x, dout)
        square = x * x
        sigmoid = ops.sigmoid(1.5957691216057308 * (x + 0.044715 * square * x))
        slope = 1.5957691216057308 * sigmoid * (1.0 - sigmoid) * (1.0 + 0.134145 * square)
        return (dout * (sigmoid + x * slope),)


class QuickGELU(Activation):
    """x * sigmoid(1.702 x), the approximation of CLIP."""

    kernel = "quick_gelu"

    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


class SiLU(Activation):
    """x * sigmoid(x)."""

    kernel = "silu"

    def construct(self, x):
        return x * ops.sigmoid(x)


class ReLU(Activation):
    """max(x, 0)."""

    kernel = "relu"

    def construct(self, x):
        return ops.relu(x)


class GatedSiLU(nn.Cell):
    """silu(gate) * up. Saves only gate and up for the backward pass."""

    def construct(self, gate, up):
        return gate * ops.sigmoid(gate) * up

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.gated_silu()

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

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return Gated(self.activation.native_form(cells))


@functools.cache
def gated_activation(name: str) -> nn.Cell:
    """Returns the shared Cell (gate, up) -> activation(gate) * up, which is compiled once for all layers."""
    return GatedSiLU() if name == "silu" else Gated(activation(name))


@functools.cache
def activation(name: str) -> nn.Cell:
    """Returns the shared Cell of an activation."""
    return ACTIVATIONS[name]()


ACTIVATIONS = {
    "gelu": GELU,
    "quick_gelu": QuickGELU,
    "silu": SiLU,
    "relu": ReLU,
    "gelu_new": TanhGELU,
    "gelu_pytorch_tanh": TanhGELU,
}


class GatedMLP(nn.Cell):
    """down_proj(act(gate_proj x) * up_proj x), without biases. x (..., hidden_size) -> the same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, hidden_act: str = "silu", dtype=ms.float32):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, has_bias=False, dtype=dtype)
        self.up_proj = Linear(hidden_size, intermediate_size, has_bias=False, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, has_bias=False, dtype=dtype)
        self.gated = gated_activation(hidden_act)

    def construct(self, x):
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class PlainMLP(nn.Cell):
    """fc2(act(fc1 x)). x (..., hidden_size) -> the same shape."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, hidden_act: str = "relu", has_bias=True, dtype=ms.float32
    ):
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size, has_bias=has_bias, dtype=dtype)
        self.fc2 = Linear(intermediate_size, hidden_size, has_bias=has_bias, dtype=dtype)
        self.act = activation(hidden_act)
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.plain_mlp(self.fc1, self.act, self.fc2)

    def construct(self, x):
        if self.native:
            return self.native(x, *matrices((self.fc1, self.fc2)))
        return self.fc2(self.act(self.fc1(x)))


def build_mlp(config: DecoderConfig, dtype) -> nn.Cell:
    """Returns a new feed-forward block of the kind in the config of a decoder."""
    sizes = config.hidden_size, config.intermediate_size
    if config.mlp == "gated":
        return GatedMLP(*sizes, hidden_act=config.hidden_act, dtype=dtype)
    return PlainMLP(*sizes, hidden_act=config.hidden_act, has_bias=config.mlp_bias, dtype=dtype)
