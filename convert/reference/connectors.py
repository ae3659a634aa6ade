"""Torch reference of TinyLLaVA's connectors: one Linear, several with exact GELUs between them, a resampler, nothing.

N images, T tokens an image, Q queries, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.tinyllava_layout import RESAMPLER_DEFAULTS, num_connector_layers

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
        """Queries (N, Q, C), image (N, T, image width) -> (N, Q, C)."""
        image = self.norm_image(image)
        heads = self.to_q(self.norm_hidden(queries)), self.to_k(image), self.to_v(image)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        queries = queries + self.to_out(attended)
        return queries + self.feed_forward(queries)


class Resampler(nn.Module):
    """Learned queries that gather the features of an image; `Resampler` of TinyLLaVABench."""

    def __init__(self, config: Mapping[str, Any], image_width: int) -> None:
        super().__init__()
        sizes = {**RESAMPLER_DEFAULTS, **config}
        width = sizes["resampler_hidden_size"]
        self.queries = nn.Parameter(torch.zeros(sizes["num_queries"], width))
        self.resampler_blocks = nn.ModuleList(
            ResamplerBlock(width, image_width) for _ in range(sizes["num_resampler_layers"])
        )
        self.post_norm = nn.LayerNorm(width)
        self.final_proj = nn.Linear(width, config["hidden_size"], bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(N, T, image width) -> (N, Q, hidden)."""
        queries = self.queries.expand(len(image), -1, -1)
        for block in self.resampler_blocks:
            queries = block(queries, image)
        return self.final_proj(self.post_norm(queries))


def build_connector(config: Mapping[str, Any], image_width: int) -> nn.Module:
    """The connector that `mm_projector_type` names: features (N, T, image_width) -> (N, T or Q, hidden).

    Raises:
        ValueError: an unknown type.
    """
    kind, hidden = config.get("mm_projector_type", "linear"), config["hidden_size"]
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(image_width, hidden)
    if kind == "resampler":
        return Resampler(config, image_width)
    modules = [nn.Linear(image_width, hidden)]
    for _ in range(num_connector_layers(kind) - 1):
        modules += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*modules)
