"""The causal language model that every family builds on.

B batch, L length, S cache slots, H heads, D head dimension, V vocabulary.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import nn, ops

from mindvlm.models.common.attention import SelfAttention, causal_mask
from mindvlm.models.common.kv_cache import LayerKVCache, slot_indices
from mindvlm.models.common.layout import widen
from mindvlm.models.common.linear import Embedding, Linear
from mindvlm.models.common.mlp import GatedMLP
from mindvlm.models.common.norm import RMSNorm
from mindvlm.models.common.rotary import logn_scale, rotary_cos_sin


@dataclass(kw_only=True)
class DecoderConfig:
    """Sizes and dialect of a decoder.

    `training_length` is the sequence length of pre-training (Qwen-1 calls it `seq_length`): dynamic NTK and LogN act
    beyond it. `intermediate_size` is the width of one MLP branch.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = True
    training_length: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02


class DecoderLayer(nn.Cell):
    """x += attention(norm(x)); x += mlp(norm(x)). x (B, L, hidden)."""

    def __init__(self, config: DecoderConfig, dtype):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = SelfAttention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype=dtype)

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
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.CellList([DecoderLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, has_bias=False, dtype=dtype)

    def construct(self, embeds, inv_freq):
        """embeds (B, L, hidden), inv_freq (D/2,) -> states after the last norm, (B, L, hidden)."""
        return self.norm(self.layer_states(embeds, inv_freq)[-1])

    def layer_states(self, embeds, inv_freq):
        """Every layer's input and the last layer's output, (B, L, hidden) each."""
        batch_size, length, _ = embeds.shape
        slots = ops.arange(length).astype(ms.int32)
        positions = ops.broadcast_to(slots.reshape((1, length)), (batch_size, length))
        cos, sin = rotary_cos_sin(positions, inv_freq, self.config.num_attention_heads)
        mask = causal_mask(positions, slots, self.config.num_attention_heads, self.dtype)
        scale = self.query_scale(positions, length)
        states = (embeds,)
        for layer in self.layers:
            states = states + (layer(states[-1], cos, sin, scale, mask),)
        return states

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
        cos, sin = rotary_cos_sin(positions, inv_freq, self.config.num_attention_heads)
        num_heads = self.config.num_attention_heads
        mask = causal_mask(positions, ops.arange(num_slots).astype(ms.int32), num_heads, self.dtype)
        indices = slot_indices(positions, num_heads)
        scale = self.query_scale(positions, num_slots)
        x = embeds
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
