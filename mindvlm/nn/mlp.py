"""Feed-forward blocks."""

import mindspore as ms
from mindspore import nn

from mindvlm.nn.activation import activation, gated_activation
from mindvlm.nn.linear import Linear


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
    """fc2(act(fc1 x)), with biases. x (..., hidden_size) -> the same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, hidden_act: str = "relu", dtype=ms.float32):
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size, dtype=dtype)
        self.fc2 = Linear(intermediate_size, hidden_size, dtype=dtype)
        self.act = activation(hidden_act)

    def construct(self, x):
        return self.fc2(self.act(self.fc1(x)))


MLPS = {"gated": GatedMLP, "plain": PlainMLP}
