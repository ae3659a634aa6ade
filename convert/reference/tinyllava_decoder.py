"""Torch reference of TinyLLaVA's decoders: Phi-2, StableLM-2 and Llama as transformers has them, without dropout.

B batch, L query length, H query heads, K key and value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.clip import ClipMlp, activation
from mindvlm.convert.reference.qwen import RMSNorm
from mindvlm.convert.reference.rotary import KVCache, Positions, RotaryDecoder

Config = Mapping[str, Any]


class GroupedAttention(nn.Module):
    """Causal attention in which each key and value head serves H / K query heads in a row."""

    def __init__(self, config: Config, *, qkv_bias: bool) -> None:
        super().__init__()
        hidden, self.num_heads = config["hidden_size"], config["num_attention_heads"]
        self.num_key_heads = config.get("num_key_value_heads") or self.num_heads
        key_width = hidden // self.num_heads * self.num_key_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=qkv_bias)

    def attend(self, x: Tensor, *, layer: int, positions: Positions, cache: KVCache | None, mask: Tensor | None):
        """x (B, L, hidden) -> what the heads gather, (B, L, hidden)."""
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
    def __init__(self, config: Config, *, qkv_bias: bool) -> None:
        super().__init__(config, qkv_bias=qkv_bias)
        self.o_proj = nn.Linear(config["hidden_size"], config["hidden_size"], bias=False)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        return self.o_proj(self.attend(x, **attention))


class PhiAttention(GroupedAttention):
    def __init__(self, config: Config) -> None:
        super().__init__(config, qkv_bias=True)
        self.dense = nn.Linear(config["hidden_size"], config["hidden_size"])

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        return self.dense(self.attend(x, **attention))


class GatedMlp(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = activation(config.get("hidden_act", "silu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    qkv_bias_key: str | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = self.norm(config)
        has_bias = bool(self.qkv_bias_key and config.get(self.qkv_bias_key))
        self.self_attn = LlamaAttention(config, qkv_bias=has_bias)
        self.post_attention_layernorm = self.norm(config)
        self.mlp = GatedMlp(config)

    @staticmethod
    def norm(config: Config) -> nn.Module:
        return RMSNorm(config["hidden_size"], config.get("rms_norm_eps", 1e-6))

    @staticmethod
    def rotary_share(config: Config) -> float:
        """How much of a head turns."""
        return 1.0

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class StableLmLayer(LlamaLayer):
    """The same with other norms, fewer turning dimensions and biases; both spellings of its config are understood."""

    qkv_bias_key = "use_qkv_bias"

    @staticmethod
    def norm(config: Config) -> nn.Module:
        return nn.LayerNorm(config["hidden_size"], eps=config.get("norm_eps", config.get("layer_norm_eps", 1e-5)))

    @staticmethod
    def rotary_share(config: Config) -> float:
        return config.get("rope_pct", config.get("partial_rotary_factor", 0.25))


class PhiLayer(nn.Module):
    """x += attention(norm x) + mlp(norm x), with one norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        act = activation(config.get("hidden_act", "gelu_new"))
        self.input_layernorm = self.norm(config)
        self.self_attn = PhiAttention(config)
        self.mlp = ClipMlp(config["hidden_size"], config["intermediate_size"], act)

    @staticmethod
    def norm(config: Config) -> nn.Module:
        return nn.LayerNorm(config["hidden_size"], eps=config.get("layer_norm_eps", 1e-5))

    @staticmethod
    def rotary_share(config: Config) -> float:
        return config.get("partial_rotary_factor", 0.5)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        normed = self.input_layernorm(x)
        return self.self_attn(normed, **attention) + self.mlp(normed) + x


LAYERS: dict[str, type[LlamaLayer] | type[PhiLayer]] = {
    "llama": LlamaLayer,
    "stablelm": StableLmLayer,
    "phi": PhiLayer,
}


class TinyLlavaDecoder(RotaryDecoder):
    """The `model` of transformers' class, but for the head.

    Args:
        config: the config.json of a language model, with the key `dialect` ("phi", "stablelm" or "llama").
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        layer = LAYERS[config["dialect"]]
        num_heads = config["num_attention_heads"]
        self.position_config = {
            "num_hidden_layers": config["num_hidden_layers"],
            "num_attention_heads": config.get("num_key_value_heads") or num_heads,
            "kv_channels": config["hidden_size"] // num_heads,
            "rotary_pct": layer.rotary_share(config),
            "rotary_emb_base": config.get("rope_theta", 10000.0),
        }
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(layer(config) for _ in range(config["num_hidden_layers"]))
        if config["dialect"] == "phi":
            self.final_layernorm = layer.norm(config)
        else:
            self.norm = layer.norm(config)

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding under the name that it has in the Qwen decoder."""
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.final_layernorm if hasattr(self, "final_layernorm") else self.norm
