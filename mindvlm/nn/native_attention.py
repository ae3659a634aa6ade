"""Attention on the C++ kernels, without gradients: with a cache, to all tokens, and over a grid.

B batch, L new tokens, S cache capacity, H query heads, K key and value heads, D head dimension, R rotated dimensions,
N images.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.native.library import Library
from mindvlm.nn.native_operator import first_shape, operator


class CachedAttention(nn.Cell):
    """Attention of new tokens with the cache of a layer, which it updates in place; for `SelfAttention.with_cache`.

    Args:
        head_dim: D.
        has_rotation: whether queries and keys are rotated by their positions.
    """

    def __init__(self, library: Library, head_dim: int, has_rotation: bool):
        super().__init__()
        self.scale = head_dim**-0.5
        self.has_rotation = has_rotation
        self.attend = operator(library, "MindvlmAttention", first_shape)
        self.angles = operator(library, "MindvlmAngles", angle_shapes, num_outputs=2)

    def shared_inputs(self, positions, inv_freq, query_scale, rows):
        """Returns the inputs that are equal in all layers; see `CausalLM.with_cache`.

        Args:
            query_scale: (B, 1, L, 1) float32, LogN scale; None for 1.
        """
        batch_size, length = positions.shape
        if self.has_rotation:
            cos, sin = self.angles(positions, inv_freq)
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
        return self.attend(query, key, value, cos, sin, positions, rows, scale, keys, values)


def angle_shapes(positions, inv_freq):
    """Returns the shapes of cos and sin, (B, L, R), for positions (B, L) and inv_freq (..., R/2)."""
    shape = [*positions, 2 * inv_freq[-1]]
    return shape, shape


class NativeMultiHead(nn.Cell):
    """Computes `MultiHeadCore`."""

    def __init__(self, library: Library, num_heads: int):
        super().__init__()
        self.attend = operator(library, "MindvlmAttendAll", first_shape)
        self.num_heads = Tensor(np.array([num_heads], np.int32))

    def construct(self, query, key, value):
        return self.attend(query, key, value, self.num_heads)


class GridAttention(nn.Cell):
    """Attention over a grid of tokens, or within windows of it, with SAM's relative positions.

    Cells of a window beyond the grid have the query, key and value of a zero token, and are not masked.
    """

    def __init__(self, library: Library):
        super().__init__()
        self.attend = operator(library, "MindvlmAttendGrid", lambda qkv, *_: [*qkv[:-1], qkv[-1] // 3])

    def construct(self, qkv, padding, row_table, column_table):
        """Attends in windows of r x c tokens.

        Args:
            qkv: (N, rows, columns, 3 * H * D), queries, keys and values.
            padding: (3 * H * D,), those of a zero token.
            row_table, column_table: (2 r - 1, D) and (2 c - 1, D), see `RelativePositionAttention`.

        Returns:
            (N, rows, columns, H * D).
        """
        return self.attend(qkv, padding, row_table, column_table)
