"""The causal language model that every family builds on.

B batch, L length, S cache slots, H heads, D head dimension, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import nn, ops

from mindvlm.models.common.attention import RotarySelfAttention, SelfAttention
from mindvlm.models.common.kv_cache import LayerKVCache, slot_indices
from mindvlm.models.common.layout import widen
from mindvlm.models.common.linear import Embedding, Head, TiedHead
from mindvlm.models.common.mlp import MLPS
from mindvlm.models.common.norm import NORMS
from mindvlm.models.common.positions import LearnedPositions, RotaryPositions
from mindvlm.models.common.rotary import logn_scale

POSITIONS = {"rotary": (RotaryPositions, RotarySelfAttention), "learned": (LearnedPositions, SelfAttention)}


@dataclass(kw_only=True)
class DecoderConfig:
    """Sizes and dialect of a decoder; the defaults are Qwen-1's dialect.

    Attributes:
        intermediate_size: the width of one MLP branch.
        norm: its epsilon is `rms_norm_eps` or `layer_norm_eps`.
        position: "rotary" with `rope_theta`, or "learned": a table of `max_position_embeddings` rows.
        mlp: "gated": down(act(gate x) * up x) without biases; "plain": fc2(act(fc1 x)) with biases.
        qkv_bias, o_bias: biases of the attention's projections into and out of the heads.
        tie_word_embeddings: the head is the table of token embeddings.
        training_length: sequence length of pre-training (Qwen-1 calls it `seq_length`); dynamic NTK and LogN act beyond
            it, with rotary positions.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    max_position_embeddings: int | None = None
    mlp: Literal["gated", "plain"] = "gated"
    hidden_act: str = "silu"
    qkv_bias: bool = True
    o_bias: bool = False
    tie_word_embeddings: bool = False
    training_length: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.position == "learned":
            self.use_dynamic_ntk = self.use_logn_attn = False


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
        _, attention = POSITIONS[config.position]
        self.input_layernorm = build_norm(config, dtype)
        self.self_attn = attention(config, dtype)
        self.post_attention_layernorm = build_norm(config, dtype)
        self.mlp = MLPS[config.mlp](
            config.hidden_size, config.intermediate_size, hidden_act=config.hidden_act, dtype=dtype
        )

    def construct(self, x, cos, sin, query_scale, mask):
        query, key, value = self.self_attn.project(self.input_layernorm(x), cos, sin)
        return self.add_branches(x, query, key, value, query_scale, mask)

    def with_cache(self, x, cos, sin, query_scale, mask, cache, indices):
        query, key, value = self.self_attn.project(self.input_layernorm(x), cos, sin)
        keys, values = cache(key, value, indices)
        return self.add_branches(x, query, keys, values, query_scale, mask)

    def add_branches(self, x, query, key, value, query_scale, mask):
        if query_scale is not None:
            query = (query * widen(query_scale, query)).astype(query.dtype)
        x = x + self.self_attn.attend(query, key, value, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Cell):
    """Embedding, decoder layers, final norm and head.

    The forward pass without a cache is `construct` (training, scoring); `with_cache` is prefill and decode.
    """

    def __init__(self, config: DecoderConfig, dtype=ms.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        positions, _ = POSITIONS[config.position]
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed_positions = positions(config, dtype)
        self.layers = nn.CellList([DecoderLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = build_norm(config, dtype)
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.embed_tokens)
            # a parameter is named after the Cell that took it last
            self.embed_tokens.update_parameters_name("embed_tokens.")
        else:
            self.lm_head = Head(config.hidden_size, config.vocab_size, dtype=dtype)

    def construct(self, embeds, inv_freq):
        """embeds (B, L, hidden), inv_freq (D/2,) -> states after the last norm, (B, L, hidden).

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
            inv_freq: (D/2,) float32.
            caches: one `LayerKVCache` a layer.

        Returns:
            States after the last norm, (B, L, hidden).
        """
        num_slots = caches[0].key.shape[2]
        cos, sin = self.embed_positions.rotation(positions, inv_freq)
        mask = self.layers[0].self_attn.mask(positions, ops.arange(num_slots).astype(ms.int32))
        indices = slot_indices(positions, self.config.num_attention_heads)
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
                LayerKVCache(batch_size, self.config.num_attention_heads, num_slots, self.config.head_dim, self.dtype)
                for _ in range(self.config.num_hidden_layers)
            ]
        )
