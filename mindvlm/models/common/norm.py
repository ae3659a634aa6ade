"""Normalisation Cells with torch's parameter names."""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.models.common.layout import widen


class RMSNorm(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) in float32, cast back, then times `weight` (Zhang and Sennrich, arXiv 1910.07467).

    The weight is applied after the cast, as Qwen-1 and Llama do. x (..., hidden_size) -> the same shape and dtype.
    """

    def __init__(self, hidden_size: int, *, eps: float, dtype=ms.float32):
        super().__init__()
        self.eps = eps
        self.weight = Parameter(initializer("ones", (hidden_size,), dtype), name="weight")
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x):
        h = x.astype(ms.float32)
        h = h * widen(ops.rsqrt(self.mean(h * h, -1) + self.eps), h)
        return h.astype(x.dtype) * widen(self.weight, x)


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis, computed in float32. x (..., hidden_size) -> the same shape and dtype."""

    def __init__(self, hidden_size: int, *, eps: float, dtype=ms.float32):
        super().__init__()
        self.weight = Parameter(initializer("ones", (hidden_size,), dtype), name="weight")
        self.bias = Parameter(initializer("zeros", (hidden_size,), dtype), name="bias")
        self.layer_norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x):
        h, _, _ = self.layer_norm(x.astype(ms.float32), self.weight.astype(ms.float32), self.bias.astype(ms.float32))
        return h.astype(x.dtype)


NORMS = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}
