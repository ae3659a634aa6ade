"""How a decoder learns where a token stands: rotation in every layer, or a table that is added once.

B batch, L length, H heads, D head dimension. Both Cells have the same two steps, so that a decoder takes either.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.nn.linear import Embedding
from mindvlm.nn.rotary import rotary_cos_sin

# The first rows of OPT's table belong to no position (`OPTLearnedPositionalEmbedding` of transformers).
NUM_OFFSET_ROWS = 2


class RotaryPositions(nn.Cell):
    """Nothing is added to the embeddings; queries and keys are rotated (arXiv 2104.09864)."""

    def __init__(self, config, dtype=ms.float32):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads

    def construct(self, embeds, positions):
        return embeds

    def rotation(self, positions, inv_freq):
        """cos and sin (B, H, L, R) for positions (B, L) and inv_freq (R/2,), for R of the D dimensions of a head."""
        return rotary_cos_sin(positions, inv_freq, self.num_heads)


class GroupedRotaryPositions(RotaryPositions):
    """The same for fewer key heads than query heads: cos and sin are pairs, for the queries and for the keys."""

    def rotation(self, positions, inv_freq):
        cos, sin = rotary_cos_sin(positions, inv_freq, self.num_heads)
        key_cos, key_sin = rotary_cos_sin(positions, inv_freq, self.num_key_value_heads)
        return (cos, key_cos), (sin, key_sin)


class LearnedPositions(Embedding):
    """OPT's table: row p + 2 is added to the token at position p; nothing is rotated.

    The original counts positions over the attention mask, so that padding on the left does not shift them. Here rows of
    a batch are aligned on the left, where slot and position are the same number; padding behind a row takes rows of its
    own, which nothing that is visible depends on.

    Args:
        config: a `DecoderConfig` with `max_position_embeddings`.
    """

    def __init__(self, config, dtype=ms.float32):
        super().__init__(config.max_position_embeddings + NUM_OFFSET_ROWS, config.hidden_size, dtype=dtype)
        self.last_position = config.max_position_embeddings - 1

    def construct(self, embeds, positions):
        """embeds (B, L, hidden), positions (B, L) int32 -> (B, L, hidden)."""
        # the padding of a prefill bucket may pass the end of the table
        rows = ops.minimum(positions, ms.Tensor(self.last_position, ms.int32)) + NUM_OFFSET_ROWS
        return embeds + self.gather(self.weight, rows, 0)

    def rotation(self, positions, inv_freq):
        return None, None
