"""The base of all decoders: the KV cache and the loop over the blocks; and that of those with rotary positions.

B batch, L query length, S cached positions, H key and value heads, D head dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mindvlm.nn.config import DecoderConfig, RopeScaling


def ntk_alpha(length: int, seq_length: int) -> float:
    """Returns the dynamic NTK factor of a prompt: 1 up to `seq_length` tokens, then 3, 7, 15 ... per doubling."""
    return max(2.0 ** math.ceil(math.log2(length / seq_length) + 1) - 1.0, 1.0)


def inverse_frequencies(head_dim: int, base: float, alpha: float = 1.0) -> Tensor:
    """Returns float32 (head_dim / 2) rotary frequencies with the base scaled by alpha^(d / (d - 2))."""
    # head_dim may be 2 if alpha is 1
    stretched = base if alpha == 1 else base * alpha ** (head_dim / (head_dim - 2))
    return 1.0 / (stretched ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Returns float32 (head_dim / 2) frequencies scaled as in Llama 3: only long wavelengths grow by the factor."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def logn_multipliers(num_positions: int, seq_length: int) -> Tensor:
    """Returns the float32 (num_positions) LogN factors, exactly 1 for the first `seq_length` positions."""
    positions = torch.arange(1, num_positions + 1, dtype=torch.float64)
    return torch.where(positions > seq_length, positions.log() / math.log(seq_length), 1.0).float()


class Positions:
    """The rotary and LogN tables of one sequence, fixed at prefill.

    Args:
        config: sizes and dialect of the decoder.
        prompt_length: length of the prompt, which determines the NTK factor.
        capacity: number of positions in the tables.
        training: whether to disable dynamic NTK and LogN.
        device: device of the tables.
    """

    def __init__(
        self, config: DecoderConfig, *, prompt_length: int, capacity: int, training: bool, device: torch.device
    ) -> None:
        stretch = config.use_dynamic_ntk and not training
        self.alpha = ntk_alpha(prompt_length, config.training_length) if stretch else 1.0
        frequencies = inverse_frequencies(config.rotary_dim, config.rope_theta, self.alpha)
        if config.rope_scaling:
            frequencies = scaled_frequencies(frequencies, config.rope_scaling)
        angles = torch.outer(torch.arange(capacity, dtype=torch.float32), frequencies).repeat(1, 2)
        self.cos, self.sin = (table[:, None, None].to(device) for table in (angles.cos(), angles.sin()))
        self.logn: Tensor | None = None
        if config.use_logn_attn and not training and capacity > config.training_length:
            self.logn = logn_multipliers(capacity, config.training_length)[:, None, None].to(device)

    def rotate(self, heads: Tensor, start: int) -> Tensor:
        """Rotates heads (B, L, *, H, D) of the positions start .. start + L - 1 in float32."""
        stop = start + heads.shape[1]
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        width = cos.shape[-1]
        turned = heads[..., :width].float()
        first, second = turned.chunk(2, dim=-1)
        turned = (turned * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)
        return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], dim=-1)


class KVCache:
    """The keys (after RoPE) and values of all layers, (B, H, S, D), allocated once and written in place.

    Args:
        config: sizes of the decoder.
        batch_size: number of rows.
        capacity: number of positions of a row.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.length = 0
        self.positions: Positions | None = None
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.key_mask: Tensor | None = None

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends key and value (B, H, L, D) and returns views (B, H, length + L, D) of all filled positions."""
        stop = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : stop].copy_(key)
        self.values[layer][:, :, self.length : stop].copy_(value)
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def reset(self) -> None:
        """Empties the cache and keeps its memory."""
        self.length, self.positions, self.key_mask = 0, None, None


class Decoder(nn.Module, ABC):
    """Base class of a decoder. A subclass sets the three attributes and defines `start`.

    Attributes:
        config: sizes and dialect.
        blocks: called with (x, layer=, cache=, mask=) and what `start` returns.
        final_norm: norm after the last block.
    """

    config: DecoderConfig
    blocks: Iterable[nn.Module]
    final_norm: nn.Module

    @abstractmethod
    def start(self, embeds: Tensor, cache: KVCache | None, real: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """Returns the input of the first block, (B, L, hidden), and further arguments of all blocks.

        Args:
            embeds: (B, L, hidden).
            cache: see `decode`.
            real: (B, S) boolean, which positions hold tokens, the new ones included; None = all.
        """

    def decode(
        self, embeds: Tensor, *, cache: KVCache | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the normed last hidden state and the input of each block, (B, L, hidden) each.

        Args:
            embeds: (B, L, hidden).
            cache: new positions are written after the filled ones; an empty cache means prefill, which fixes the NTK
                factor of rotary positions. None computes without a cache.
            attention_mask: (B, L) of the new positions, nonzero = real token; None = all real.

        Raises:
            ValueError: the cache, or a table of learned positions, is too small.
        """
        batch_size, num_new = embeds.shape[:2]
        start = cache.length if cache else 0
        if cache and start + num_new > cache.capacity:
            raise ValueError(f"{start + num_new} positions: the cache has {cache.capacity}")
        mask = visible_keys(attention_mask, cache, batch_size, num_new, embeds.device)
        real = cache.key_mask if cache else attention_mask
        x, arguments = self.start(embeds, cache, None if real is None else real.to(embeds.device) != 0)
        inputs = []
        for index, block in enumerate(self.blocks):
            inputs.append(x)
            x = block(x, layer=index, cache=cache, mask=mask, **arguments)
        if cache:
            cache.length += num_new
        return self.final_norm(x), inputs


class RotaryDecoder(Decoder):
    """Base class of a decoder with rotary positions, which are indices in the cache and count padding."""

    def start(self, embeds: Tensor, cache: KVCache | None, real: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        positions = cache.positions if cache else None
        if positions is None:
            positions = Positions(
                self.config,
                prompt_length=embeds.shape[1],
                capacity=cache.capacity if cache else embeds.shape[1],
                training=self.training,
                device=embeds.device,
            )
            if cache:
                cache.positions = positions
        return embeds, {"positions": positions}


def visible_keys(
    attention_mask: Tensor | None, cache: KVCache | None, batch_size: int, num_new: int, device: torch.device
) -> Tensor | None:
    """Returns which keys each query attends to, boolean (B, 1, L, S), or None for plain causal attention."""
    start = cache.length if cache else 0
    keys = None if attention_mask is None else attention_mask.to(device).bool()
    if cache and (keys is not None or cache.key_mask is not None):
        real = torch.ones(batch_size, start + num_new, dtype=torch.bool, device=device)
        past = real[:, :start] if cache.key_mask is None else cache.key_mask
        keys = cache.key_mask = torch.cat([past, real[:, start:] if keys is None else keys], dim=1)
    if keys is None and (start == 0 or num_new == 1):
        return None
    indices = torch.arange(start + num_new, device=device)
    causal = indices[None, :] <= indices[start:, None]
    if keys is None:
        return causal[None, None]
    # a padded query attends to itself, otherwise its softmax would be 0/0
    itself = indices[None, :] == indices[start:, None]
    return causal & (keys[:, None, None, :] | itself)
