"""Torch reference of the Qwen-1 decoder (modeling_qwen.py of Qwen-1.8B as used by Vary-toy).

B batch, L query length, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.rotary import KVCache, Positions, RotaryDecoder
from mindvlm.nn.config import DecoderConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, *, layer: int, positions: Positions, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        start = cache.length if cache else 0
        num_new = x.shape[1]
        qkv = self.c_attn(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key = positions.rotate(qkv[:, :, :2], start).unbind(2)
        if positions.logn is not None:
            query = query * positions.logn[start : start + num_new].to(query.dtype)
        query, key, value = (part.transpose(1, 2) for part in (query, key, qkv[:, :, 2]))
        if cache:
            key, value = cache.write(layer, key, value)
        causal = mask is None and num_new > 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """c_proj(w1(x) * SiLU(w2(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, branch = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, branch, bias=False)
        self.w2 = nn.Linear(width, branch, bias=False)
        self.c_proj = nn.Linear(branch, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), **attention)
        return x + self.mlp(self.ln_2(x))


class QwenDecoder(RotaryDecoder):
    """The `transformer` of the official state dict: embedding, blocks, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    @property
    def final_norm(self) -> RMSNorm:
        return self.ln_f
