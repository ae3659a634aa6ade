"""Torch reference of the OPT decoder (Zhang et al., arXiv 2205.01068; `OPTModel` of transformers) as Vary-tiny has it.

B batch, L query length, S cached slots, H heads, D head dim. Positions count the real tokens of a row, so padding on
the left does not shift them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.rotary import KVCache
from mindvlm.convert.reference.vary_tiny_layout import POSITION_OFFSET


class OptAttention(nn.Module):
    """Multi-head attention, every projection with a bias."""

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

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.self_attn = OptAttention(width, config["num_attention_heads"])
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config["ffn_dim"])
        self.fc2 = nn.Linear(config["ffn_dim"], width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), **attention)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class OptDecoder(nn.Module):
    """The `model.decoder` of the official state dict, without dropout.

    Args:
        config: official config.json as a dict.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        # what `KVCache` reads
        self.position_config = {**config, "kv_channels": width // config["num_attention_heads"]}
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.embed_positions = nn.Embedding(config["max_position_embeddings"] + POSITION_OFFSET, width)
        self.layers = nn.ModuleList(OptLayer(config) for _ in range(config["num_hidden_layers"]))
        self.final_layer_norm = nn.LayerNorm(width)

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding under the name that it has in the Qwen decoder."""
        return self.embed_tokens

    def decode(
        self, embeds: Tensor, *, cache: KVCache | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, L, hidden) -> (normed last hidden state, list of the input of every layer).

        Args:
            cache: filled slots come first and the new ones are written behind them. None computes without a cache.
            attention_mask: (B, L), nonzero = real token of the new slots; None = all real.

        Raises:
            ValueError: the cache or the table of positions is too small.
        """
        batch_size, num_new = embeds.shape[:2]
        start = cache.length if cache else 0
        if cache and start + num_new > cache.num_slots:
            raise ValueError(f"{start + num_new} slots: the cache was made for {cache.num_slots}")
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
        """Rows of the table for slots whose tokens are `real` (B, S): row 2 for the first token, row 1 for padding."""
        rows = real.long().cumsum(1) * real - 1 + POSITION_OFFSET
        num_rows = self.embed_positions.num_embeddings
        if int(rows.max()) >= num_rows:
            raise ValueError(f"{int(rows.max()) - 1} tokens: there are {num_rows - POSITION_OFFSET} positions")
        return rows


def visible_keys(real: Tensor, num_new: int) -> Tensor:
    """Boolean (B, 1, num_new, S): which slots of `real` (B, S) the last `num_new` slots see."""
    slots = torch.arange(real.shape[1], device=real.device)
    queries = slots[-num_new:, None]
    # a padded query sees at least itself, else its softmax would be 0/0
    return (slots[None, :] <= queries) & (real[:, None, None, :] | (slots[None, :] == queries))
