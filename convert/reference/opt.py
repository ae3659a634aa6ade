"""Torch reference of the OPT decoder of Vary-tiny (Zhang et al., arXiv 2205.01068; `OPTModel` of transformers).

B batch, L query length, S cached slots, H heads, D head dim. Positions count the real tokens of a row; padding on the
left does not shift them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.rotary import KVCache
from mindvlm.nn.config import NUM_OFFSET_ROWS, DecoderConfig


class OptAttention(nn.Module):
    """Multi-head attention; all projections have a bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *, layer: int, cache: KVCache | None, visible: Tensor) -> Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache:
            key, value = cache.write(layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
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


class OptDecoder(nn.Module):
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

    def decode(
        self, embeds: Tensor, *, cache: KVCache | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the normed last hidden state and the input of each layer, (B, L, hidden) each.

        Args:
            embeds: (B, L, hidden).
            cache: new slots are written after the filled ones. None computes without a cache.
            attention_mask: (B, L) of the new slots, nonzero = real token; None = all real.

        Raises:
            ValueError: the cache or the position table is too small.
        """
        batch_size, num_new = embeds.shape[:2]
        start = cache.length if cache else 0
        if cache and start + num_new > cache.num_slots:
            raise ValueError(f"{start + num_new} slots: the cache has {cache.num_slots}")
        new = torch.ones(batch_size, num_new, dtype=torch.bool, device=embeds.device)
        if attention_mask is not None:
            new = attention_mask.to(embeds.device) != 0
        real = new
        if cache:
            past = torch.ones(batch_size, start, dtype=torch.bool, device=embeds.device)
            real = cache.key_mask = torch.cat([past if cache.key_mask is None else cache.key_mask, new], dim=1)
        x = embeds + self.embed_positions(self.position_rows(real)[:, start:])
        visible = visible_keys(real, num_new)
        inputs = []
        for index, layer in enumerate(self.layers):
            inputs.append(x)
            x = layer(x, layer=index, cache=cache, visible=visible)
        if cache:
            cache.length += num_new
        return self.final_layer_norm(x), inputs

    def position_rows(self, real: Tensor) -> Tensor:
        """Returns the position rows of slots with `real` tokens (B, S): 2 for the first token, 1 for padding.

        Raises:
            ValueError: the position table is too small.
        """
        rows = real.long().cumsum(1) * real - 1 + NUM_OFFSET_ROWS
        num_rows = self.embed_positions.num_embeddings
        if int(rows.max()) >= num_rows:
            raise ValueError(f"{int(rows.max()) - 1} tokens: there are {num_rows - NUM_OFFSET_ROWS} positions")
        return rows


def visible_keys(real: Tensor, num_new: int) -> Tensor:
    """Returns which slots of `real` (B, S) the last `num_new` slots attend to, boolean (B, 1, num_new, S)."""
    slots = torch.arange(real.shape[1], device=real.device)
    queries = slots[-num_new:, None]
    # a padded query attends to itself, otherwise its softmax would be 0/0
    return (slots[None, :] <= queries) & (real[:, None, None, :] | (slots[None, :] == queries))
