"""Cells on the C++ kernels that take the place of others in a built model for inference on a CPU.

B batch, L new tokens, S cache capacity, H query heads, K key and value heads, D head dimension, R rotated dimensions.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.native.library import Library
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.mlp import GatedSiLU
from mindvlm.nn.norm import RMSNorm
from mindvlm.nn.positions import LearnedPositions
from mindvlm.nn.rotary import rotary_cos_sin


def use_native_cells(model: nn.Cell, library: Library) -> None:
    """Replaces attention with a cache, RMSNorm and gated SiLU of a model by Cells on the kernels, without gradients."""
    gated = NativeGatedSiLU(library)
    norms: dict[float, NativeRMSNorm] = {}
    for _, cell in list(model.cells_and_names()):
        if isinstance(cell, CausalLM):
            is_learned = isinstance(cell.embed_positions, LearnedPositions)
            attention = NativeAttention(library, cell.config.head_dim, has_rotation=not is_learned)
            for layer in cell.layers:
                layer.self_attn.native = attention
        elif isinstance(cell, RMSNorm):
            cell.core = norms.setdefault(cell.eps, NativeRMSNorm(library, cell.eps))
        elif isinstance(getattr(cell, "gated", None), GatedSiLU):
            cell.gated = gated


def operator(library: Library, function: str, shape, width: int = 0) -> ops.Custom:
    """Returns the operator of a function of the library, whose output is float32.

    Args:
        shape: the shapes of the inputs -> that of the output.
        width: a number that `shape` depends on.
    """
    made = ops.Custom(f"{library.path}:{function}", shape, lambda *_: ms.float32, func_type="aot")
    # PyNative mode keeps output shapes by attributes, which do not include `shape`
    made.add_prim_attr("width", width)
    return made


def first_shape(first, *others):
    return first


class NativeAttention(nn.Cell):
    """Attention of new tokens with the cache of a layer, which it updates in place; for `SelfAttention.with_cache`.

    Args:
        head_dim: D.
        has_rotation: whether queries and keys are rotated by their positions.
    """

    def __init__(self, library: Library, head_dim: int, *, has_rotation: bool):
        super().__init__()
        self.scale = head_dim**-0.5
        self.has_rotation = has_rotation
        self.attend = operator(library, "MindvlmAttention", first_shape)

    def shared_inputs(self, positions, inv_freq, query_scale, rows):
        """Returns the inputs that are equal in all layers; see `CausalLM.with_cache`.

        Args:
            query_scale: (B, 1, L, 1) float32, LogN scale; None for 1.
        """
        batch_size, length = positions.shape
        if self.has_rotation:
            cos, sin = rotary_cos_sin(positions, inv_freq, 1)
            cos, sin = cos.reshape((batch_size, length, -1)), sin.reshape((batch_size, length, -1))
        else:
            cos, sin = ops.ones((batch_size, length, 2), ms.float32), ops.zeros((batch_size, length, 2), ms.float32)
        scale = ops.full((batch_size, length), self.scale, dtype=ms.float32)
        if query_scale is not None:
            scale = scale * query_scale.reshape((batch_size, length))
        if rows is None:
            rows = ops.arange(batch_size).astype(ms.int32)
        return cos, sin, positions, rows, scale

    def construct(self, query, key, value, keys, values, cos, sin, positions, rows, scale):
        """query (B, L, H * D), key and value (B, L, K * D), caches (rows, K, S, D) -> (B, L, H * D)."""
        return self.attend(query, key, value, cos, sin, keys, values, positions, rows, scale)


class NativeRMSNorm(nn.Cell):
    """Computes `RMSNorm`: x (N, hidden), weight (hidden,) -> (N, hidden)."""

    def __init__(self, library: Library, eps: float):
        super().__init__()
        self.norm = operator(library, "MindvlmRmsNorm", first_shape)
        self.eps = Tensor(np.array([eps], np.float32))

    def construct(self, x, weight):
        return self.norm(x, weight, self.eps)


class NativeGatedSiLU(nn.Cell):
    """silu(gate) * up."""

    def __init__(self, library: Library):
        super().__init__()
        self.multiply = operator(library, "MindvlmGatedSilu", first_shape)

    def construct(self, gate, up):
        return self.multiply(gate, up)
