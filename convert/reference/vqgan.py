"""Torch reference of openMUSE's taming VQGAN (arXiv 2012.09841), without dropout. The state dict has its names.

N pictures, C channels, P positions, E width of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.models.delvm.model_config import VqganConfig


def norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(groups, num_in), nn.Conv2d(num_in, num_out, 3, padding=1)
        self.norm2, self.conv2 = norm(groups, num_out), nn.Conv2d(num_out, num_out, 3, padding=1)
        if num_in != num_out:
            self.nin_shortcut = nn.Conv2d(num_in, num_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Resampling(nn.Module):
    """Halves (`down`) or doubles the edges."""

    def __init__(self, channels: int, *, down: bool, with_conv: bool) -> None:
        super().__init__()
        self.down = down
        if with_conv:
            self.conv = (
                nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        if not self.down:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x) if hasattr(self, "conv") else x
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Level(nn.Module):
    """The blocks of a resolution, then `downsample` or `upsample`, if any."""

    def __init__(self, config: VqganConfig, level: int, *, down: bool) -> None:
        super().__init__()
        multiples = [1, *config.channel_mult] if down else [*config.channel_mult[1:], config.channel_mult[-1]]
        num_in, width = config.hidden_channels * multiples[level], config.hidden_channels * config.channel_mult[level]
        num_blocks = config.num_res_blocks + (not down)
        has_attention = config.resolution // 2**level in config.attn_resolutions
        groups = config.num_groups
        self.block = nn.ModuleList(ResnetBlock(width if i else num_in, width, groups) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttentionBlock(width, groups) for _ in range(num_blocks if has_attention else 0))
        if level != (config.num_levels - 1 if down else 0):
            change = Resampling(width, down=down, with_conv=config.resample_with_conv)
            setattr(self, "downsample" if down else "upsample", change)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            # one block alone: the original skips its attention
            if len(self.attn) > 1:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        width = config.hidden_channels * config.channel_mult[-1]
        self.block_1 = ResnetBlock(width, width, config.num_groups)
        if not config.no_attn_mid_block:
            self.attn_1 = AttentionBlock(width, config.num_groups)
        self.block_2 = ResnetBlock(width, width, config.num_groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        return self.block_2(self.attn_1(x) if hasattr(self, "attn_1") else x)


class Half(nn.Module):
    """The encoder (`down`) or the decoder."""

    def __init__(self, config: VqganConfig, *, down: bool) -> None:
        super().__init__()
        first, last = config.hidden_channels * config.channel_mult[0], config.hidden_channels * config.channel_mult[-1]
        num_in, start = (config.num_channels, config.hidden_channels) if down else (config.z_channels, last)
        end, num_out = (last, config.z_channels) if down else (first, config.num_channels)
        self.is_down = down
        self.conv_in = nn.Conv2d(num_in, start, 3, padding=1)
        levels = nn.ModuleList(Level(config, level, down=down) for level in range(config.num_levels))
        setattr(self, "down" if down else "up", levels)
        self.mid = Middle(config)
        self.norm_out, self.conv_out = norm(config.num_groups, end), nn.Conv2d(end, num_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        steps = [*self.down, self.mid] if self.is_down else [self.mid, *reversed(self.up)]
        for step in steps:
            x = step(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_embeddings, config.quantized_embed_dim)


class ReferenceVqgan(nn.Module):
    """Pixels (N, 3, height, width) in 0..1 to codes and back."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Half(config, down=True), Half(config, down=False)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.quantized_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.quantized_embed_dim, config.z_channels, 1)

    def latent(self, pixels: Tensor) -> Tensor:
        """Returns what is quantized, (N, E, r, k)."""
        return self.quant_conv(self.encoder(pixels))

    def codes(self, latent: Tensor) -> Tensor:
        """Returns the nearest codes row by row, (N, P)."""
        rows = latent.flatten(2).transpose(1, 2)
        return torch.cdist(rows, self.quantize.embedding.weight[None].expand(len(rows), -1, -1)).argmin(-1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Returns the pixels of square pictures of codes (N, P)."""
        side = round(codes.shape[1] ** 0.5)
        rows = self.quantize.embedding(codes).transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(self.post_quant_conv(rows))
