"""The KV cache of a decoder layer: allocated once, updated in place, read without a copy or a transpose.

B cache rows, b rows of a call, K key and value heads, S capacity, L new tokens, D head dimension.
"""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer


class LayerKVCache(nn.Cell):
    """Keys and values of shape (B, K, S, D).

    Unused positions hold zeros or stale values, which the attention mask hides. The padding of a prefill bucket may
    therefore be written; later tokens overwrite it.
    """

    def __init__(self, batch_size: int, num_heads: int, capacity: int, head_dim: int, dtype=ms.float32):
        super().__init__()
        shape = (batch_size, num_heads, capacity, head_dim)
        self.key = Parameter(initializer("zeros", shape, dtype), name="key", requires_grad=False)
        self.value = Parameter(initializer("zeros", shape, dtype), name="value", requires_grad=False)
        self.write = ops.ScatterNdUpdate()

    def construct(self, key, value, indices, rows=None):
        """Writes the keys and values of new tokens and returns those of the whole rows.

        Args:
            key, value: (b, K, L, D).
            indices: (b, K, L, 3) int32 from `cache_indices`.
            rows: (b,) int32, the rows to write; None for all B in order, which are returned without a copy.

        Returns:
            Keys and values of these rows, (b, K, S, D) each.
        """
        keys, values = self.write(self.key, indices, key), self.write(self.value, indices, value)
        if rows is None:
            return keys, values
        return ops.gather(keys, rows, 0), ops.gather(values, rows, 0)

    def clear_row(self, row: int) -> None:
        """Fills one row with zeros."""
        for cache in (self.key, self.value):
            is_row = ops.arange(cache.shape[0]).reshape((-1, 1, 1, 1)) == row
            cache.set_data(ops.select(ops.broadcast_to(is_row, cache.shape), ops.zeros_like(cache), cache))

    def copy_from(self, smaller: "LayerKVCache") -> None:
        """Copies the contents of a cache with the same rows and less capacity, on the device."""
        for target, source in ((self.key, smaller.key), (self.value, smaller.value)):
            batch_size, num_heads, capacity, head_dim = target.shape
            rest = ops.zeros((batch_size, num_heads, capacity - source.shape[2], head_dim), target.dtype)
            target.set_data(ops.concat((source, rest), 2))


def cache_indices(positions, num_heads: int, rows=None):
    """Returns the cache index of each head of each new token.

    Args:
        positions: (b, L) int32.
        num_heads: K.
        rows: (b,) int32, the cache row of each row of `positions`; None for 0 .. b - 1.

    Returns:
        (b, K, L, 3) int32: row, head, position.
    """
    batch_size, length = positions.shape
    shape = (batch_size, num_heads, length)
    if rows is None:
        rows = ops.arange(batch_size).astype(ms.int32)
    rows = ops.broadcast_to(rows.reshape((batch_size, 1, 1)), shape)
    heads = ops.broadcast_to(ops.arange(num_heads).astype(ms.int32).reshape((1, num_heads, 1)), shape)
    return ops.stack((rows, heads, ops.broadcast_to(ops.expand_dims(positions, 1), shape)), -1)
