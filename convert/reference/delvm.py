"""Torch reference of DeLVM's decoder, in the form of a training and in that of Hugging Face (arXiv 2402.04841).

B batch, L query length, H heads, D head dim. The state dict has the original names, without the input embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.hf_decoder import GatedMlp, LlamaAttention
from mindvlm.convert.reference.image_text import ImageTextReference
from mindvlm.convert.reference.qwen import RMSNorm
from mindvlm.convert.reference.rotary import KVCache, Positions, RotaryDecoder
from mindvlm.nn.config import DecoderConfig


def norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class Mixer(nn.Module):
    """Attention of a training: query, key and value in one projection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        self.Wqkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, *, layer: int, positions: Positions, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1))
        turned = positions.rotate(qkv[:, :, :2], cache.length if cache else 0)
        query, key, value = (part.transpose(1, 2) for part in (*turned.unbind(2), qkv[:, :, 2]))
        if cache:
            key, value = cache.write(layer, key, value)
        is_causal = mask is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """w3(silu(w1 x) * w2 x): w1 is the gate, w2 goes up, w3 goes down."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class PlainMlp(nn.Module):
    """fc2(gelu(fc1 x)); the original approximates GELU in a training, and not in its Hugging Face form."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.approximate = "none" if config.hidden_act == "gelu" else "tanh"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class TrainingLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = norm(config), Mixer(config), norm(config)
        self.mlp = FeedForward(config) if config.mlp == "gated" else PlainMlp(config)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.mixer(self.norm1(x), **attention)
        return x + self.mlp(self.norm2(x))


class HfLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = norm(config), LlamaAttention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = GatedMlp(config) if config.mlp == "gated" else PlainMlp(config)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class DelvmDecoder(RotaryDecoder):
    """`model.*` of either state dict; `wte` holds a row for each code, in whatever form the input is stored."""

    def __init__(self, config: DecoderConfig, *, training_form: bool) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        layer, self.layers_name = (TrainingLayer, "blocks") if training_form else (HfLayer, "layers")
        self.add_module(self.layers_name, nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers)))
        self.norm = norm(config)
        if training_form:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __getattr__(self, name: str) -> Any:
        # `blocks` is the module's own name in a training
        return super().__getattr__("layers" if name == "blocks" and "layers" in self._modules else name)

    @property
    def final_norm(self) -> nn.Module:
        return self.norm


class ReferenceDelvm(ImageTextReference):
    def __init__(self, config: DecoderConfig, *, training_form: bool) -> None:
        super().__init__()
        self.config = config
        self.model = DelvmDecoder(config, training_form=training_form)
        if not training_form:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def transformer(self) -> DelvmDecoder:
        """The decoder."""
        return self.model

    @property
    def placeholder_id(self) -> int:
        """No id: the prompt consists of codes."""
        return -1

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits of normed hidden states: (..., hidden) -> (..., vocab)."""
        return (self.model.head if hasattr(self.model, "head") else self.lm_head)(hidden)

    def encode_images(self, *pixels: Tensor) -> Tensor:
        raise NotImplementedError("pictures become codes, which need no features")

    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        raise NotImplementedError("pictures become codes, which need no features")


def projection_of(codebook: Tensor, table: Tensor) -> Tensor:
    """Returns the projection (hidden, E) whose product with the codebook (V, E) is nearest to the table (V, hidden)."""
    return torch.linalg.lstsq(codebook.double(), table.double()).solution.T.float()
