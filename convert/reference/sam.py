"""Torch reference of Vary's vision vocabulary: the SAM ViT-B image encoder (Kirillov et al. 2023) and two convolutions.

N images, R x W patch rows and columns, C channels, H heads, D head dim, S = R*W tokens of one attention call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.models.vary.model_config import VisionVocabularyConfig
from mindvlm.nn.config import grid_size

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).permute(0, 2, 3, 1)


class RelativeAttention(nn.Module):
    """Attention over an R x W grid with decomposed relative positions: score += q.R_h[dy] + q.R_w[dx], q unscaled."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, width // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, width // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._bias(q, rows, columns)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (rows, columns))

    def _bias(self, q: Tensor, rows: int, columns: int) -> Tensor:
        grid = q.unflatten(2, (rows, columns))
        vertical = torch.einsum("nhrwd,rkd->nhrwk", grid, _table(self.rel_pos_h, rows))
        horizontal = torch.einsum("nhrwd,wkd->nhrwk", grid, _table(self.rel_pos_w, columns))
        return (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(4, 5).flatten(2, 3)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, inner)
        self.lin2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    """Pre-norm block with global attention (`window` 0) or attention inside zero-padded windows of that side."""

    def __init__(self, config: VisionVocabularyConfig, *, grid: tuple[int, int], window: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = RelativeAttention(width, config.num_heads, (window, window) if window else grid)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = _attend_in_windows(self.attn, y, self.window) if self.window else self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an NCHW map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, NORM_EPS)
        return y.permute(0, 3, 1, 2)


class VisionVocabulary(nn.Module):
    """The SAM image encoder, its neck and two stride-2 convolutions, with the official state dict."""

    def __init__(self, config: VisionVocabularyConfig) -> None:
        super().__init__()
        width, out = config.embed_dim, config.out_chans
        grid = grid_size(config.image_size, config.patch_size)
        self.patch_embed = PatchEmbed(width, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, width))
        windows = [0 if i in config.global_attn_indexes else config.window_size for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, grid=grid, window=window) for window in windows)
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False),
            ChannelNorm(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            ChannelNorm(out),
        )
        self.net_2 = nn.Conv2d(out, config.net_2_channels, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(config.net_2_channels, config.net_3_channels, 3, stride=2, padding=1, bias=False)

    def stages(self, pixels: Tensor) -> dict[str, Tensor]:
        """Returns all intermediate maps of pixels (N, 3, height, width).

        `embed` and `block_0`... are (N, R, W, C); `neck`, `net_2`, `net_3` are NCHW; `tokens` is (N, T, channels).
        """
        x = self.patch_embed(pixels) + self.pos_embed
        outputs = {"embed": x}
        for index, block in enumerate(self.blocks):
            x = block(x)
            outputs[f"block_{index}"] = x
        outputs["neck"] = self.neck(x.permute(0, 3, 1, 2))
        outputs["net_2"] = self.net_2(outputs["neck"])
        outputs["net_3"] = self.net_3(outputs["net_2"])
        outputs["tokens"] = outputs["net_3"].flatten(2).transpose(1, 2)
        return outputs

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns tokens, row-major: pixels (N, 3, height, width) -> (N, T, net_3_channels)."""
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.net_3(self.net_2(self.neck(x.permute(0, 3, 1, 2)))).flatten(2).transpose(1, 2)


def _table(rel_pos: Tensor, size: int) -> Tensor:
    index = torch.arange(size, device=rel_pos.device)
    return rel_pos[index[:, None] - index[None, :] + size - 1]


def _attend_in_windows(attn: nn.Module, x: Tensor, window: int) -> Tensor:
    num, rows, columns, width = x.shape
    x = F.pad(x, (0, 0, 0, -columns % window, 0, -rows % window))
    down, across = x.shape[1] // window, x.shape[2] // window
    x = x.view(num, down, window, across, window, width).transpose(2, 3).reshape(-1, window, window, width)
    x = attn(x).view(num, down, across, window, window, width).transpose(2, 3)
    return x.reshape(num, down * window, across * window, width)[:, :rows, :columns]
