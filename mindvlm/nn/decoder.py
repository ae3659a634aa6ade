"""The causal language model of all families.

B batch, L length, S cache capacity, H query heads, K key and value heads, D head dimension, R rotated dimensions, V
vocabulary.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.nn.attention import GroupedRotarySelfAttention, RotarySelfAttention, SelfAttention, scaled
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.dropout import RowDropout, new_counter
from mindvlm.nn.kv_cache import LayerKVCache, cache_indices
from mindvlm.nn.linear import BiasedHead, Embedding, Head, TiedHead
from mindvlm.nn.mlp import build_mlp
from mindvlm.nn.norm import NORMS
from mindvlm.nn.positions import GroupedRotaryPositions, LearnedPositions, RotaryPositions
from mindvlm.nn.rotary import logn_scale


def position_cells(config: DecoderConfig) -> tuple[type[nn.Cell], type[nn.Cell]]:
    """Returns the position and attention Cells for a config."""
    if config.position == "learned":
        return LearnedPositions, SelfAttention
    if config.is_grouped:
        return GroupedRotaryPositions, GroupedRotarySelfAttention
    return RotaryPositions, RotarySelfAttention


def build_norm(config: DecoderConfig, dtype) -> nn.Cell:
    """Returns a new norm of the kind in the config."""
    eps = config.rms_norm_eps if config.norm == "rms_norm" else config.layer_norm_eps
    return NORMS[config.norm](config.hidden_size, eps=eps, dtype=dtype)


def all_positions(batch_size: int, length: int):
    """Returns 0 .. L - 1 for every row, (B, L) int32."""
    slots = ops.arange(length).astype(ms.int32)
    return ops.broadcast_to(slots.reshape((1, length)), (batch_size, length))


class DecoderLayer(nn.Cell):
    """x += attention(norm(x)); x += mlp(norm(x)). x (B, L, hidden)."""

    def __init__(self, config: DecoderConfig, context: BuildContext):
        super().__init__()
        dtype = context.dtype
        _, attention = position_cells(config)
        self.input_layernorm = build_norm(config, dtype)
        self.self_attn = attention(config, context)
        if config.residual == "sequential":
            self.post_attention_layernorm = build_norm(config, dtype)
        self.mlp = build_mlp(config, dtype)

    def construct(self, x, cos, sin, query_scale, mask):
        normed = self.input_layernorm(x)
        query, key, value = self.self_attn.project(normed, cos, sin)
        attended = self.self_attn.attend(scaled(query, query_scale), key, value, mask)
        return self.add_branches(x, normed, attended)

    def with_cache(self, x, cache, *shared):
        """Runs new tokens against the layer's cache; shared inputs are those of `CausalLM.cached_inputs`."""
        normed = self.input_layernorm(x)
        return self.add_branches(x, normed, self.self_attn.with_cache(normed, cache, *shared))

    def add_branches(self, x, normed, attended):
        """Input x, its first norm and the attention's output -> the output of the layer."""
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelLayer(DecoderLayer):
    """x += attention(norm(x)) + mlp(norm(x)) with one shared norm, as in Phi-2."""

    def add_branches(self, x, normed, attended):
        return attended + self.mlp(normed) + x


class DroppingParallelLayer(ParallelLayer):
    """`ParallelLayer` with dropout on both branches in training.

    Args:
        index: index of the layer.
        counter: see `RowDropout`.
    """

    def __init__(self, config: DecoderConfig, context: BuildContext, *, index: int, counter):
        super().__init__(config, context)
        p, width = config.residual_dropout, config.hidden_size
        self.drop_attention = RowDropout(p, width, index=2 * index, counter=counter, dtype=context.dtype)
        self.drop_mlp = RowDropout(p, width, index=2 * index + 1, counter=counter, dtype=context.dtype)

    def add_branches(self, x, normed, attended):
        return self.drop_attention(attended) + self.drop_mlp(self.mlp(normed)) + x


def build_layers(config: DecoderConfig, context: BuildContext) -> nn.CellList:
    """Returns the decoder layers for a config.

    Raises:
        UserError: the config sets dropout for sequential layers.
    """
    layers = range(config.num_hidden_layers)
    if config.residual == "sequential":
        if config.residual_dropout:
            raise UserError(
                f"language_model.residual_dropout is {config.residual_dropout}; only residual: parallel supports it; "
                "set it to 0"
            )
        return nn.CellList([DecoderLayer(config, context) for _ in layers])
    if not config.residual_dropout:
        return nn.CellList([ParallelLayer(config, context) for _ in layers])
    counter = new_counter()
    return nn.CellList([DroppingParallelLayer(config, context, index=i, counter=counter) for i in layers])


class CausalLM(nn.Cell):
    """Embedding, decoder layers, final norm and head.

    `construct` runs without a cache (training, scoring); `with_cache` runs prefill and decode.

    Attributes:
        native: all layers with a cache, see `native_form`; None without.
    """

    def __init__(self, config: DecoderConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.config = config
        self.dtype = dtype = context.dtype
        positions, _ = position_cells(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed_positions = positions(config, dtype)
        self.layers = build_layers(config, context)
        self.norm = build_norm(config, dtype)
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.embed_tokens)
            # MindSpore names a shared parameter after the last Cell it is assigned to
            self.embed_tokens.update_parameters_name("embed_tokens.")
        else:
            head = BiasedHead if config.head_bias else Head
            self.lm_head = head(config.hidden_size, config.vocab_size, dtype=dtype)
        self.native = None

    def native_form(self, cells):
        """See `mindvlm.nn.native_cells.use_native_cells`."""
        return cells.decoder_layers(self.config, self.layers)

    @property
    def has_exact_rows(self) -> bool:
        """Whether a token has the same bits whatever blocks of tokens `with_cache` computes together with it.

        MindSpore's products sum in an order that depends on the number of rows, those of the C++ kernels only up to 15
        rows. `lm_head` needs the same number of rows.
        """
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.native is not None and hasattr(head.product, "handle")

    def construct(self, embeds, inv_freq, positions=None, segment_ids=None):
        """Returns the states after the final norm, (B, L, hidden).

        Args:
            embeds: (B, L, hidden).
            inv_freq: (R/2,) float32; learned positions ignore it.
            positions: (B, L) int32; None for 0 .. L - 1 in each row.
            segment_ids: (B, L) int32; a token sees those of its segment up to itself. None: a row is one segment.
        """
        return self.norm(self.layer_states(embeds, inv_freq, positions, segment_ids)[-1])

    def layer_states(self, embeds, inv_freq, positions=None, segment_ids=None):
        """Returns the input of every layer, learned positions included, and the last output, (B, L, hidden) each."""
        batch_size, length, _ = embeds.shape
        if positions is None:
            positions = all_positions(batch_size, length)
        shared = self.shared_inputs(positions, inv_freq, segment_ids)
        states = (self.embed_positions(embeds, positions),)
        for layer in self.layers:
            states = states + (layer(states[-1], *shared),)
        return states

    def shared_inputs(self, positions, inv_freq, segment_ids=None):
        """Returns the inputs that all layers share without a cache: cos, sin, query scale and mask."""
        cos, sin = self.embed_positions.rotation(positions, inv_freq)
        mask = self.layers[0].self_attn.mask_without_cache(positions, segment_ids)
        return cos, sin, self.query_scale(positions, positions.shape[1]), mask

    def with_cache(self, embeds, positions, inv_freq, caches, rows=None):
        """Runs L new tokens against the cache.

        Args:
            embeds: (B, L, hidden).
            positions: (B, L) int32; a token attends to the positions of its row up to its own.
            inv_freq: (R/2,) float32 for all rows, or (B, 1, R/2).
            caches: one `LayerKVCache` per layer.
            rows: (B,) int32, cache rows of the tokens; None for all rows in order.

        Returns:
            States after the final norm, (B, L, hidden).
        """
        capacity = caches[0].key.shape[2]
        shared = self.cached_inputs(positions, inv_freq, capacity, rows)
        x = self.embed_positions(embeds, positions)
        if self.native:
            return self.norm(self.native.with_cache(x, caches, *shared))
        for i in range(len(self.layers)):
            x = self.layers[i].with_cache(x, caches[i], *shared)
        return self.norm(x)

    def cached_inputs(self, positions, inv_freq, capacity, rows):
        """Returns the inputs that all layers share with a cache of this capacity."""
        scale, attention = self.query_scale(positions, capacity), self.layers[0].self_attn
        if attention.native:
            return attention.native.shared_inputs(positions, inv_freq, scale, rows)
        cos, sin = self.embed_positions.rotation(positions, inv_freq)
        mask = attention.mask(positions, ops.arange(capacity).astype(ms.int32))
        return cos, sin, scale, mask, cache_indices(positions, self.config.num_key_value_heads, rows), rows

    def query_scale(self, positions, max_length):
        """Returns the LogN scale, or None where it is 1: in training and up to the training length."""
        if self.training or not self.config.use_logn_attn or max_length <= self.config.training_length:
            return None
        return logn_scale(positions, self.config.training_length)

    def new_caches(self, batch_size: int, capacity: int) -> nn.CellList:
        """Returns empty caches for all layers."""
        return nn.CellList(
            [
                LayerKVCache(batch_size, self.config.num_key_value_heads, capacity, self.config.head_dim, self.dtype)
                for _ in range(self.config.num_hidden_layers)
            ]
        )
