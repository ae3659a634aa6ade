"""Normalization Cells with torch's parameter names."""

from __future__ import annotations

import functools

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.nn.layout import read_with


class RMSNorm(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) in float32, cast back, then times `weight` (Zhang and Sennrich, arXiv 1910.07467).

    The weight is applied after the cast, as Qwen-1 and Llama do. x (..., hidden_size) -> the same shape and dtype.
    """

    def __init__(self, hidden_size: int, *, eps: float, dtype=ms.float32):
        super().__init__()
        self.eps = eps
        self.weight = Parameter(initializer("ones", (hidden_size,), dtype), name="weight")
        self.core = rms_norm_core(eps)

    def construct(self, x):
        return self.core(x.reshape((-1, x.shape[-1])), self.weight).reshape(x.shape)


@functools.cache
def rms_norm_core(eps: float) -> RMSNormCore:
    """Returns the shared RMSNormCore of an epsilon, which is compiled once for all layers."""
    return RMSNormCore(eps)


class RMSNormCore(nn.Cell):
    """Computes `RMSNorm`; saves only its inputs for the backward pass. x (N, hidden), weight (hidden,)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)
        self.tile = ops.Tile()
        self.sum_columns = ops.MatMul()
        self.sum_rows = ops.MatMul(transpose_a=True)

    def construct(self, x, weight):
        h = x.astype(ms.float32)
        # otherwise a training step would tile the weights of all layers up front
        weight = read_with(weight, x)
        h = h * self.widen(self.scale(h), h)
        return h.astype(x.dtype) * self.widen(weight.reshape((1, -1)), h)

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.rms_norm(self.eps)

    def scale(self, h):
        return ops.rsqrt(self.mean(h * h, -1) + self.eps)

    def widen(self, small, h):
        """Tiles small (N, 1) or (1, hidden) to (N, hidden)."""
        return self.tile(small, (h.shape[0] // small.shape[0], h.shape[1] // small.shape[1]))

    def bprop(self, x, weight, out, dout):
        # with r the scale and s = sum(dout * weight * h): dh = r dout weight - h r^3 s / n
        h, d = ops.depend(x, dout).astype(ms.float32), dout.astype(ms.float32)
        w = read_with(weight, dout).astype(ms.float32)
        r = self.scale(h)
        product = d * h
        along = self.sum_columns(product, w.reshape((-1, 1))) * r * r * r / -h.shape[1]
        gradient = d * self.widen(w.reshape((1, -1)), h) * self.widen(r, h) + h * self.widen(along, h)
        weight_gradient = self.sum_rows(r, product).reshape(weight.shape)
        return gradient.astype(x.dtype), weight_gradient.astype(weight.dtype)


class LayerNorm(nn.Cell):
    """Layer normalization over the last axis, computed in float32. x (..., hidden_size) -> the same shape and dtype.

    Attributes:
        is_exempt_from_decay: whether the parameters are exempt from weight decay, as those of `torch.nn.LayerNorm` are
            in the original training programs.
        native: see `native_form`; None without.
    """

    is_exempt_from_decay = True

    def __init__(self, hidden_size: int, *, eps: float, dtype=ms.float32):
        super().__init__()
        self.weight = Parameter(initializer("ones", (hidden_size,), dtype), name="weight")
        self.bias = Parameter(initializer("zeros", (hidden_size,), dtype), name="bias")
        self.eps = eps
        self.layer_norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.layer_norm(self.eps)

    def construct(self, x):
        if self.native:
            return self.native(x, self.weight, self.bias)
        weight, bias = read_with(self.weight, x), read_with(self.bias, x)
        h, _, _ = self.layer_norm(x.astype(ms.float32), weight.astype(ms.float32), bias.astype(ms.float32))
        return h.astype(x.dtype)


NORMS = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


def norm_weights(model: nn.Cell) -> frozenset[str]:
    """Returns the names of the weights of all RMSNorms and LayerNorms."""
    return frozenset(cell.weight.name for _, cell in model.cells_and_names() if isinstance(cell, RMSNorm | LayerNorm))


def layer_norm_parameters(model: nn.Cell) -> frozenset[str]:
    """Returns the parameter names of all LayerNorms that are exempt from weight decay, as all biases are."""
    cells = [cell for _, cell in model.cells_and_names()]
    norms = [cell for cell in cells if isinstance(cell, LayerNorm) and cell.is_exempt_from_decay]
    return frozenset(parameter.name for norm in norms for parameter in norm.get_parameters(expand=False))
