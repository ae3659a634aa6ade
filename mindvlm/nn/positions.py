"""Position encodings of a decoder: rotation in every layer, or a learned table that is added once.

All Cells have the same two methods, `construct` for the embeddings and `rotation` for the layers.

B batch, L length, H heads, D head dimension, R rotated dimensions.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.nn.config import NUM_OFFSET_ROWS
from mindvlm.nn.linear import Embedding
from mindvlm.nn.rotary import rotary_cos_sin


class RotaryPositions(nn.Cell):
    """Rotary positions (arXiv 2104.09864); the embeddings stay unchanged."""

    def __init__(self, config, dtype=ms.float32):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads

    def construct(self, embeds, positions):
        return embeds

    def rotation(self, positions, inv_freq):
        """Returns cos and sin (B, H, L, R) for positions (B, L) and inv_freq (R/2,) or (B, 1, R/2)."""
        return rotary_cos_sin(positions, inv_freq, self.num_heads)


class GroupedRotaryPositions(RotaryPositions):
    """`RotaryPositions` for grouped-query attention: cos and sin are pairs, for the queries and for the keys."""

    def rotation(self, positions, inv_freq):
        cos, sin = rotary_cos_sin(positions, inv_freq, self.num_heads)
        key_cos, key_sin = rotary_cos_sin(positions, inv_freq, self.num_key_value_heads)
        return (cos, key_cos), (sin, key_sin)


class LearnedPositions(Embedding):
    """OPT's learned positions: row p + 2 of the table is added to the token at position p.

    The original derives positions from the attention mask, so left padding does not shift them. Here batches are padded
    on the right, so a position is the index of the token; no visible token depends on the padding.

    Args:
        config: a `DecoderConfig` with `max_position_embeddings`.
    """

    def __init__(self, config, dtype=ms.float32):
        super().__init__(config.max_position_embeddings + NUM_OFFSET_ROWS, config.hidden_size, dtype=dtype)
        self.last_position = config.max_position_embeddings - 1

    def construct(self, embeds, positions):
        """embeds (B, L, hidden), positions (B, L) int32 -> (B, L, hidden)."""
        # the padding of a prefill bucket may exceed the table
        rows = ops.minimum(positions, ms.Tensor(self.last_position, ms.int32)) + NUM_OFFSET_ROWS
        return embeds + super().construct(rows)

    def rotation(self, positions, inv_freq):
        return None, None
