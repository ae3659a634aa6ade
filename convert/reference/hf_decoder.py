"""Torch reference of transformers' decoders Phi-2, StableLM-2, Llama and Qwen2, without dropout.

B batch, L query length, H query heads, K key and value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.clip import ClipMlp, activation
from mindvlm.convert.reference.qwen import RMSNorm
from mindvlm.convert.reference.rotary import KVCache, Positions, RotaryDecoder
from mindvlm.models.hf.decoders import dialect_of_decoder
from mindvlm.nn.config import DecoderConfig


class GroupedAttention(nn.Module):
    """Causal attention in which H / K consecutive query heads share a key and value head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, self.num_heads, self.num_key_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        key_width = config.head_dim * self.num_key_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=config.qkv_bias)

    def attend(self, x: Tensor, *, layer: int, positions: Positions, cache: KVCache | None, mask: Tensor | None):
        """Returns the outputs of all heads before the output projection: (B, L, hidden) -> (B, L, hidden)."""
        start = cache.length if cache else 0
        # (B, L, 1, heads, D): `rotate` takes queries and keys stacked
        query = self.q_proj(x).unflatten(-1, (1, self.num_heads, -1))
        key = self.k_proj(x).unflatten(-1, (1, self.num_key_heads, -1))
        query, key = (positions.rotate(heads, start).squeeze(2).transpose(1, 2) for heads in (query, key))
        value = self.v_proj(x).unflatten(-1, (self.num_key_heads, -1)).transpose(1, 2)
        if cache:
            key, value = cache.write(layer, key, value)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            enable_gqa=self.num_key_heads != self.num_heads,
        )
        return out.transpose(1, 2).flatten(2)


class LlamaAttention(GroupedAttention):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.o_bias)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        return self.o_proj(self.attend(x, **attention))


class PhiAttention(GroupedAttention):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        return self.dense(self.attend(x, **attention))


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def layer_norm(config: DecoderConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class LlamaLayer(nn.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = self.norm(config)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = self.norm(config)
        self.mlp = GatedMlp(config)

    @staticmethod
    def norm(config: DecoderConfig) -> nn.Module:
        return RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class StableLmLayer(LlamaLayer):
    """A Llama layer with LayerNorm."""

    norm = staticmethod(layer_norm)


class PhiLayer(nn.Module):
    """x += attention(norm x) + mlp(norm x), with a shared norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        act = activation(config.hidden_act)
        self.input_layernorm = self.norm(config)
        self.self_attn = PhiAttention(config)
        self.mlp = ClipMlp(config.hidden_size, config.intermediate_size, act)

    norm = staticmethod(layer_norm)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        normed = self.input_layernorm(x)
        return self.self_attn(normed, **attention) + self.mlp(normed) + x


LAYERS: dict[str, type[LlamaLayer] | type[PhiLayer]] = {
    "llama": LlamaLayer,
    "qwen2": LlamaLayer,
    "stablelm": StableLmLayer,
    "phi": PhiLayer,
}


class HfDecoder(RotaryDecoder):
    """The `model` of transformers' class, without the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        dialect = dialect_of_decoder(config)
        layer = LAYERS[dialect]
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        if dialect == "phi":
            self.final_layernorm = layer.norm(config)
        else:
            self.norm = layer.norm(config)

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding, under the name of the Qwen decoder."""
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.final_layernorm if hasattr(self, "final_layernorm") else self.norm
