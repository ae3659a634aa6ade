"""The causal language model that every family builds on.

B batch, L length, S cache slots, H query heads, K key and value heads, D head dimension, R of it turned by rotary
positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import nn, ops

from mindvlm.core.errors import UserError
from mindvlm.nn.attention import GroupedRotarySelfAttention, RotarySelfAttention, SelfAttention
from mindvlm.nn.dropout import RowDropout, new_counter
from mindvlm.nn.kv_cache import LayerKVCache, slot_indices
from mindvlm.nn.layout import widen
from mindvlm.nn.linear import BiasedHead, Embedding, Head, TiedHead
from mindvlm.nn.mlp import MLPS
from mindvlm.nn.norm import NORMS
from mindvlm.nn.positions import GroupedRotaryPositions, LearnedPositions, RotaryPositions
from mindvlm.nn.rotary import logn_scale


@dataclass(kw_only=True)
class DecoderConfig:
    """Sizes and dialect of a decoder; the defaults are Qwen-1's dialect.

    Attributes:
        intermediate_size: the width of one MLP branch.
        norm: its epsilon is `rms_norm_eps` or `layer_norm_eps`.
        num_key_value_heads: each serves as many query heads in a row; null for one for every query head.
        position: "rotary" with `rope_theta`, or "learned": a table of `max_position_embeddings` rows.
        partial_rotary_factor: the share of a head's dimensions, the first ones, that rotary positions turn.
        residual: "sequential": attention, then the MLP, each behind a norm; "parallel": both behind one norm.
        residual_dropout: probability that a parallel branch's element is dropped in training.
        mlp: "gated": down(act(gate x) * up x) without biases; "plain": fc2(act(fc1 x)) with biases.
        qkv_bias, o_bias: biases of the attention's projections into and out of the heads.
        float32_scores: queries and keys are multiplied in float32 whatever the dtype.
        tie_word_embeddings: the head is the table of token embeddings.
        head_bias: the logits have a bias.
        training_length: sequence length of pre-training (Qwen-1 calls it `seq_length`); dynamic NTK and LogN act beyond
            it, with rotary positions.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int
    intermediate_size: int
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int | None = None
    residual: Literal["sequential", "parallel"] = "sequential"
    residual_dropout: float = 0.0
    mlp: Literal["gated", "plain"] = "gated"
    hidden_act: str = "silu"
    qkv_bias: bool = True
    o_bias: bool = False
    float32_scores: bool = False
    tie_word_embeddings: bool = False
    head_bias: bool = False
    training_length: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.position == "learned":
            self.use_dynamic_ntk = self.use_logn_attn = False
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """R: an inverse frequency belongs to two of these dimensions."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def is_grouped(self) -> bool:
        """Whether there are fewer key and value heads than query heads."""
        return self.num_key_value_heads != self.num_attention_heads


def position_cells(config: DecoderConfig) -> tuple[type[nn.Cell], type[nn.Cell]]:
    """The Cells of positions and of attention that the config asks for."""
    if config.position == "learned":
        return LearnedPositions, SelfAttention
    if config.is_grouped:
        return GroupedRotaryPositions, GroupedRotarySelfAttention
    return RotaryPositions, RotarySelfAttention


def build_norm(config: DecoderConfig, dtype) -> nn.Cell:
    """The norm that the config names."""
    eps = config.rms_norm_eps if config.norm == "rms_norm" else config.layer_norm_eps
    return NORMS[config.norm](config.hidden_size, eps=eps, dtype=dtype)


def all_positions(batch_size: int, length: int):
    """0 .. L - 1 for every row, (B, L) int32."""
    slots = ops.arange(length).astype(ms.int32)
    return ops.broadcast_to(slots.reshape((1, length)), (batch_size, length))


class DecoderLayer(nn.Cell):
    """x += attention(norm(x)); x += mlp(norm(x)). x (B, L, hidden)."""

    def __init__(self, config: DecoderConfig, dtype):
        super().__init__()
        _, attention = position_cells(config)
        self.input_layernorm = build_norm(config, dtype)
        self.self_attn = attention(config, dtype)
        if config.residual == "sequential":
            self.post_attention_layernorm = build_norm(config, dtype)
        self.mlp = MLPS[config.mlp](
            config.hidden_size, config.intermediate_size, hidden_act=config.hidden_act, dtype=dtype
        )

    def construct(self, x, cos, sin, query_scale, mask):
        normed = self.input_layernorm(x)
        query, key, value = self.self_attn.project(normed, cos, sin)
        attended = self.self_attn.attend(scaled(query, query_scale), key, value, mask)
        return self.add_branches(x, normed, attended)

    def with_cache(self, x, cos, sin, query_scale, mask, cache, indices):
        normed = self.input_layernorm(x)
        query, key, value = self.self_attn.project(normed, cos, sin)
        keys, values = cache(key, value, indices)
        attended = self.self_attn.attend(scaled(query, query_scale), keys, values, mask)
        return self.add_branches(x, normed, attended)

    def add_branches(self, x, normed, attended):
        """x and what the first norm and the attention made of it -> the layer's output."""
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelLayer(DecoderLayer):
    """x += attention(norm(x)) + mlp(norm(x)), with one norm for both, as in Phi-2."""

    def add_branches(self, x, normed, attended):
        return attended + self.mlp(normed) + x


class DroppingParallelLayer(ParallelLayer):
    """The same with dropout on both branches in training.

    Args:
        index: of the layer.
        counter: see `RowDropout`.
    """

    def __init__(self, config: DecoderConfig, dtype, *, index: int, counter):
        super().__init__(config, dtype)
        p, width = config.residual_dropout, config.hidden_size
        self.drop_attention = RowDropout(p, width, index=2 * index, counter=counter, dtype=dtype)
        self.drop_mlp = RowDropout(p, width, index=2 * index + 1, counter=counter, dtype=dtype)

    def add_branches(self, x, normed, attended):
        return self.drop_attention(attended) + self.drop_mlp(self.mlp(normed)) + x


def build_layers(config: DecoderConfig, dtype) -> nn.CellList:
    """The layers of the kind that the config asks for.

    Raises:
        UserError: dropout in sequential layers.
    """
    layers = range(config.num_hidden_layers)
    if config.residual == "sequential":
        if config.residual_dropout:
            raise UserError("language_model.residual_dropout is for residual: parallel; set it to 0")
        return nn.CellList([DecoderLayer(config, dtype) for _ in layers])
    if not config.residual_dropout:
        return nn.CellList([ParallelLayer(config, dtype) for _ in layers])
    counter = new_counter()
    return nn.CellList([DroppingParallelLayer(config, dtype, index=i, counter=counter) for i in layers])


def scaled(query, query_scale):
    """query (B, H, L, D) times query_scale (B, 1, L, 1), or as it is where that is None."""
    if query_scale is None:
        return query
    return (query * widen(query_scale, query)).astype(query.dtype)


class CausalLM(nn.Cell):
    """Embedding, decoder layers, final norm and head.

    The forward pass without a cache is `construct` (training, scoring); `with_cache` is prefill and decode.
    """

    def __init__(self, config: DecoderConfig, dtype=ms.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        positions, _ = position_cells(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed_positions = positions(config, dtype)
        self.layers = build_layers(config, dtype)
        self.norm = build_norm(config, dtype)
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.embed_tokens)
            # a parameter is named after the Cell that took it last
            self.embed_tokens.update_parameters_name("embed_tokens.")
        else:
            head = BiasedHead if config.head_bias else Head
            self.lm_head = head(config.hidden_size, config.vocab_size, dtype=dtype)

    def construct(self, embeds, inv_freq):
        """embeds (B, L, hidden), inv_freq (R/2,) -> states after the last norm, (B, L, hidden).

        Learned positions leave inv_freq aside.
        """
        return self.norm(self.layer_states(embeds, inv_freq)[-1])

    def layer_states(self, embeds, inv_freq):
        """Every layer's input (learned positions are in the first) and the last layer's output, (B, L, hidden) each."""
        batch_size, length, _ = embeds.shape
        positions = all_positions(batch_size, length)
        shared = self.shared_inputs(positions, inv_freq)
        states = (self.embed_positions(embeds, positions),)
        for layer in self.layers:
            states = states + (layer(states[-1], *shared),)
        return states

    def shared_inputs(self, positions, inv_freq):
        """What every layer takes besides its states where there is no cache: cos, sin, scale of the queries, mask."""
        cos, sin = self.embed_positions.rotation(positions, inv_freq)
        mask = self.layers[0].self_attn.mask_without_cache(positions)
        return cos, sin, self.query_scale(positions, positions.shape[1]), mask

    def with_cache(self, embeds, positions, inv_freq, caches):
        """Runs L new tokens against the cache.

        Args:
            embeds: (B, L, hidden).
            positions: (B, L) int32, the slot that each token takes; a token sees the slots up to its own.
            inv_freq: (R/2,) float32.
            caches: one `LayerKVCache` a layer.

        Returns:
            States after the last norm, (B, L, hidden).
        """
        num_slots = caches[0].key.shape[2]
        cos, sin = self.embed_positions.rotation(positions, inv_freq)
        mask = self.layers[0].self_attn.mask(positions, ops.arange(num_slots).astype(ms.int32))
        indices = slot_indices(positions, self.config.num_key_value_heads)
        scale = self.query_scale(positions, num_slots)
        x = self.embed_positions(embeds, positions)
        for i in range(len(self.layers)):
            x = self.layers[i].with_cache(x, cos, sin, scale, mask, caches[i], indices)
        return self.norm(x)

    def query_scale(self, positions, max_length):
        """LogN scale, or None where it cannot differ from 1: in training, and while no slot passes the training
        length."""
        if self.training or not self.config.use_logn_attn or max_length <= self.config.training_length:
            return None
        return logn_scale(positions, self.config.training_length)

    def new_caches(self, batch_size: int, num_slots: int) -> nn.CellList:
        """Empty caches for all layers."""
        return nn.CellList(
            [
                LayerKVCache(batch_size, self.config.num_key_value_heads, num_slots, self.config.head_dim, self.dtype)
                for _ in range(self.config.num_hidden_layers)
            ]
        )
