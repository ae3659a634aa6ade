"""The KV cache of one decoder layer: allocated once, written in place, read without a copy or a transpose.

B batch, H key/value heads, S slots, L new tokens, D head dimension.
"""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer


class LayerKVCache(nn.Cell):
    """Keys and values of shape (B, H, S, D).

    Slots beyond what was written hold zeros or stale rows; the attention mask hides them, so padding of a prefill
    bucket may be written and is overwritten by the tokens that follow.
    """

    def __init__(self, batch_size: int, num_heads: int, num_slots: int, head_dim: int, dtype=ms.float32):
        super().__init__()
        shape = (batch_size, num_heads, num_slots, head_dim)
        self.key = Parameter(initializer("zeros", shape, dtype), name="key", requires_grad=False)
        self.value = Parameter(initializer("zeros", shape, dtype), name="value", requires_grad=False)
        self.write = ops.ScatterNdUpdate()

    def construct(self, key, value, indices):
        """Writes key, value (B, H, L, D) at indices (B, H, L, 3) int32 and returns the whole buffers (B, H, S, D)."""
        return self.write(self.key, indices, key), self.write(self.value, indices, value)


def slot_indices(positions, num_heads: int):
    """(B, H, L, 3) int32 rows (batch, head, slot) that place token l of row b at slot positions[b, l]."""
    batch_size, length = positions.shape
    shape = (batch_size, num_heads, length)
    batch = ops.broadcast_to(ops.arange(batch_size).astype(ms.int32).reshape((batch_size, 1, 1)), shape)
    heads = ops.broadcast_to(ops.arange(num_heads).astype(ms.int32).reshape((1, num_heads, 1)), shape)
    slots = ops.broadcast_to(ops.expand_dims(positions, 1), shape)
    return ops.stack((batch, heads, slots), -1)
