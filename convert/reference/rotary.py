"""What decoders with rotary positions have in common: position tables, the KV cache, the loop over the blocks.

B batch, L query length, S cached slots, H key and value heads, D head dim. Positions are slot indices,
padding included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def ntk_alpha(length: int, seq_length: int) -> float:
    """Dynamic NTK factor for a prompt of `length` slots: 1 up to `seq_length`, then 3, 7, 15 ... per doubling."""
    return max(2.0 ** math.ceil(math.log2(length / seq_length) + 1) - 1.0, 1.0)


def inverse_frequencies(head_dim: int, base: float, alpha: float = 1.0) -> Tensor:
    """Float32 (head_dim / 2) rotary frequencies with the base stretched by alpha^(d / (d - 2))."""
    # without a stretch a head may turn in two dimensions alone
    stretched = base if alpha == 1 else base * alpha ** (head_dim / (head_dim - 2))
    return 1.0 / (stretched ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def logn_multipliers(num_slots: int, seq_length: int) -> Tensor:
    """Float32 (num_slots): the LogN factor of each 0-based slot, exactly 1 for the first `seq_length` slots."""
    slots = torch.arange(1, num_slots + 1, dtype=torch.float64)
    return torch.where(slots > seq_length, slots.log() / math.log(seq_length), 1.0).float()


class Positions:
    """Rotary and LogN tables of one sequence, fixed when its prompt is prefilled.

    Args:
        config: official config.json as a dict.
        prompt_length: slots of the prompt; decides the NTK factor.
        num_slots: how many slots the tables cover.
        training: dynamic NTK and LogN act only outside training.
    """

    def __init__(
        self, config: Mapping[str, Any], *, prompt_length: int, num_slots: int, training: bool, device: torch.device
    ) -> None:
        stretch = config.get("use_dynamic_ntk", False) and not training
        self.alpha = ntk_alpha(prompt_length, config["seq_length"]) if stretch else 1.0
        head_dim = int(config["kv_channels"] * config.get("rotary_pct", 1.0))
        frequencies = inverse_frequencies(head_dim, float(config["rotary_emb_base"]), self.alpha)
        angles = torch.outer(torch.arange(num_slots, dtype=torch.float32), frequencies).repeat(1, 2)
        self.cos, self.sin = (table[:, None, None].to(device) for table in (angles.cos(), angles.sin()))
        self.logn: Tensor | None = None
        if config.get("use_logn_attn", False) and not training and num_slots > config["seq_length"]:
            self.logn = logn_multipliers(num_slots, config["seq_length"])[:, None, None].to(device)

    def rotate(self, heads: Tensor, start: int) -> Tensor:
        """Rotate (B, L, *, H, D) heads that occupy slots start .. start + L - 1, in float32."""
        stop = start + heads.shape[1]
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        width = cos.shape[-1]
        turned = heads[..., :width].float()
        first, second = turned.chunk(2, dim=-1)
        turned = (turned * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)
        return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], dim=-1)


class KVCache:
    """Keys (after RoPE) and values of every layer, (B, H, S, D), allocated once and written in place.

    Args:
        config: official config.json as a dict.
        batch_size: number of rows.
        num_slots: capacity; appending beyond it raises ValueError.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        batch_size: int,
        num_slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, config["num_attention_heads"], num_slots, config["kv_channels"])
        self.num_slots = num_slots
        self.length = 0
        self.positions: Positions | None = None
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config["num_hidden_layers"])]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config["num_hidden_layers"])]
        self.key_mask: Tensor | None = None

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, H, L, D) behind the filled slots; returns views (B, H, length + L, D) of all filled slots."""
        stop = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : stop].copy_(key)
        self.values[layer][:, :, self.length : stop].copy_(value)
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def reset(self) -> None:
        """Forget the content, keep the memory."""
        self.length, self.positions, self.key_mask = 0, None, None


class RotaryDecoder(nn.Module):
    """Base of a decoder: a subclass sets the three attributes.

    Attributes:
        position_config: the keys that `Positions` and `KVCache` read, in the words of Qwen-1's config.json.
        blocks: called with (x, layer=, positions=, cache=, mask=).
        final_norm: behind the last block.
    """

    position_config: Mapping[str, Any]
    blocks: Iterable[nn.Module]
    final_norm: nn.Module

    def decode(
        self, embeds: Tensor, *, cache: KVCache | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, L, hidden) -> (normed last hidden state, list of the input of every block).

        Args:
            cache: filled slots come first and the new ones are written behind them; an empty cache is a prefill and
                fixes the NTK factor. None computes without a cache.
            attention_mask: (B, L), nonzero = real token of the new slots; None = all real.

        Raises:
            ValueError: the cache is too small.
        """
        batch_size, num_new = embeds.shape[:2]
        start = cache.length if cache else 0
        if cache and start + num_new > cache.num_slots:
            raise ValueError(f"{start + num_new} slots: the cache was made for {cache.num_slots}")
        positions = cache.positions if cache else None
        if positions is None:
            num_slots = cache.num_slots if cache else num_new
            positions = Positions(
                self.position_config,
                prompt_length=num_new,
                num_slots=num_slots,
                training=self.training,
                device=embeds.device,
            )
            if cache:
                cache.positions = positions
        mask = visible_slots(attention_mask, cache, batch_size, num_new, embeds.device)
        inputs = []
        x = embeds
        for index, block in enumerate(self.blocks):
            inputs.append(x)
            x = block(x, layer=index, positions=positions, cache=cache, mask=mask)
        if cache:
            cache.length += num_new
        return self.final_norm(x), inputs


def visible_slots(
    attention_mask: Tensor | None, cache: KVCache | None, batch_size: int, num_new: int, device: torch.device
) -> Tensor | None:
    """Boolean (B, 1, L, S) of what each query sees, or None where plain causal order says it all."""
    start = cache.length if cache else 0
    keys = None if attention_mask is None else attention_mask.to(device).bool()
    if cache and (keys is not None or cache.key_mask is not None):
        real = torch.ones(batch_size, start + num_new, dtype=torch.bool, device=device)
        past = real[:, :start] if cache.key_mask is None else cache.key_mask
        keys = cache.key_mask = torch.cat([past, real[:, start:] if keys is None else keys], dim=1)
    if keys is None and (start == 0 or num_new == 1):
        return None
    slots = torch.arange(start + num_new, device=device)
    causal = slots[None, :] <= slots[start:, None]
    if keys is None:
        return causal[None, None]
    # A padded query sees at least itself, else its softmax would be 0/0.
    itself = slots[None, :] == slots[start:, None]
    return causal & (keys[:, None, None, :] | itself)
