"""Torch reference of TinyLLaVA's connectors: one Linear, several with exact GELUs between them, a resampler, identity.

N images, T tokens per image, Q queries, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.models.tinyllava.model_config import ConnectorConfig

RESAMPLER_HEADS, RESAMPLER_512_HEADS = 12, 8


class ResamplerBlock(nn.Module):
    """queries += attention(queries, image); queries += linear(gelu(linear(norm queries)))."""

    def __init__(self, width: int, image_width: int) -> None:
        super().__init__()
        self.num_heads = RESAMPLER_512_HEADS if width == 512 else RESAMPLER_HEADS
        self.norm_image = nn.LayerNorm(image_width)
        self.norm_hidden = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(image_width, width, bias=False)
        self.to_v = nn.Linear(image_width, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Updates the queries: queries (N, Q, C), image (N, T, image width) -> (N, Q, C)."""
        image = self.norm_image(image)
        heads = self.to_q(self.norm_hidden(queries)), self.to_k(image), self.to_v(image)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        queries = queries + self.to_out(attended)
        return queries + self.feed_forward(queries)


class Resampler(nn.Module):
    """Learned queries that attend to the features of an image (`Resampler` of TinyLLaVABench)."""

    def __init__(self, config: ConnectorConfig, image_width: int, hidden_size: int) -> None:
        super().__init__()
        width = config.resampler_hidden_size
        self.queries = nn.Parameter(torch.zeros(config.num_queries, width))
        self.resampler_blocks = nn.ModuleList(
            ResamplerBlock(width, image_width) for _ in range(config.num_resampler_layers)
        )
        self.post_norm = nn.LayerNorm(width)
        self.final_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """Resamples features: (N, T, image width) -> (N, Q, hidden)."""
        queries = self.queries.expand(len(image), -1, -1)
        for block in self.resampler_blocks:
            queries = block(queries, image)
        return self.final_proj(self.post_norm(queries))


def build_connector(config: ConnectorConfig, image_width: int, hidden_size: int) -> nn.Module:
    """Returns the connector: features (N, T, image_width) -> (N, T or Q, hidden_size)."""
    if config.type == "identity":
        return nn.Identity()
    if config.type == "linear":
        return nn.Linear(image_width, hidden_size)
    if config.type == "resampler":
        return Resampler(config, image_width, hidden_size)
    modules = [nn.Linear(image_width, hidden_size)]
    for _ in range(config.num_linears - 1):
        modules += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*modules)
