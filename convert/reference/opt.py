"""Torch reference of the OPT decoder of Vary-tiny (Zhang et al., arXiv 2205.01068; `OPTModel` of transformers).

B batch, L query length, S cached positions, H heads, D head dim. The learned positions count the real tokens of a row;
padding on the left does not shift them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.clip import ClipAttention
from mindvlm.convert.reference.rotary import Decoder, KVCache
from mindvlm.nn.config import NUM_OFFSET_ROWS, DecoderConfig


class OptAttention(ClipAttention):
    """Causal multi-head attention; all projections have a bias."""

    def forward(self, x: Tensor, *, layer: int, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        query, key, value = self.heads(x)
        if cache:
            key, value = cache.write(layer, key, value)
        causal = mask is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class OptLayer(nn.Module):
    """Pre-norm block: x += attention(norm x); x += fc2(relu(fc1(norm x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = OptAttention(width, config.num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), **attention)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class OptDecoder(Decoder):
    """The `model.decoder` of the official state dict, without dropout."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + NUM_OFFSET_ROWS, width)
        self.layers = nn.ModuleList(OptLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(width)

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding, under the name of the Qwen decoder."""
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def final_norm(self) -> nn.LayerNorm:
        return self.final_layer_norm

    def start(self, embeds: Tensor, cache: KVCache | None, real: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        first = cache.length if cache else 0
        if real is None:
            real = torch.ones(1, first + embeds.shape[1], dtype=torch.bool, device=embeds.device)
        return embeds + self.embed_positions(self.position_rows(real)[:, first:]), {}

    def position_rows(self, real: Tensor) -> Tensor:
        """Returns the position rows of `real` tokens (B, S): 2 for the first token, 1 for padding.

        Raises:
            ValueError: the position table is too small.
        """
        rows = real.long().cumsum(1) * real - 1 + NUM_OFFSET_ROWS
        num_rows = self.embed_positions.num_embeddings
        if int(rows.max()) >= num_rows:
            raise ValueError(f"{int(rows.max()) - 1} tokens: there are {num_rows - NUM_OFFSET_ROWS} positions")
        return rows
