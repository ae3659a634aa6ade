"""Torch reference of SliME (arXiv 2406.08487): tower, gated global adapter, local compression, router, Llama decoder.

N views, T tokens of a view, Q queries, W width of the tower, R rows. The state dict uses the original names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.clip import TowerHolder
from mindvlm.convert.reference.hf_decoder import HfDecoder
from mindvlm.convert.reference.image_text import ImageTextReference
from mindvlm.models.slime.model_config import SlimeModelConfig
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID

HEAD_DIM, NORM_EPS = 128, 1e-6


class QueryAttention(nn.Module):
    """Learned queries that attend to the tokens of a view (`Resampler`)."""

    def __init__(self, width: int, num_queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.pos_embed = nn.Parameter(torch.zeros(num_queries, width), requires_grad=False)
        self.attn = nn.MultiheadAttention(width, width // HEAD_DIM, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=NORM_EPS)
        self.ln_post = nn.LayerNorm(width, eps=NORM_EPS)

    def key_positions(self, num_tokens: int) -> Tensor:
        """Returns the positions resized to the grid of the keys, (num_tokens, W)."""
        old, new = math.isqrt(len(self.pos_embed)), math.isqrt(num_tokens)
        grid = self.pos_embed.unflatten(0, (old, old)).permute(2, 0, 1)[None]
        resized = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T

    def forward(self, x: Tensor) -> Tensor:
        """Resamples features: (N, T, W) -> (N, Q, W)."""
        value = self.ln_kv(x)
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        attended, _ = self.attn(query, value + self.key_positions(x.shape[1]), value, need_weights=False)
        return self.ln_post(attended)


class GatedProjector(nn.Module):
    """Two experts that share an MLP, and a gate without noise. `w_noise` is not used, as in the original."""

    def __init__(self, config: SlimeModelConfig) -> None:
        super().__init__()
        width, hidden = config.vision_tower.hidden_size, config.language_model.hidden_size
        self.expert = {"learned": None, "mlp": 0, "resampler": 1}[config.gate]
        self.projection = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.attn = QueryAttention(width, config.num_global_tokens)
        self.w_gate = nn.Parameter(torch.zeros(width, 2))
        self.w_noise = nn.Parameter(torch.zeros(width, 2))

    def gates(self, x: Tensor) -> Tensor:
        """Returns the weights of the experts: (N, T, W) -> (N, T, 2)."""
        weights = (x @ self.w_gate).softmax(-1)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Projects global views: (N, T, W) -> (N, T, hidden)."""
        experts = torch.stack((self.projection(x), self.projection(self.attn(x))), -1)
        if self.expert is not None:
            return experts[..., self.expert]
        return (experts * self.gates(x)[..., None, :]).sum(-1)


class Sampler(nn.Module):
    """The local compression under one more level of names."""

    def __init__(self, config: SlimeModelConfig) -> None:
        super().__init__()
        self.post_qformer = QueryAttention(config.vision_tower.hidden_size, config.num_local_tokens)


class SlimeBody(HfDecoder):
    """`model.*` of the original state dict, without the buffers `mean` and `std`."""

    def __init__(self, config: SlimeModelConfig) -> None:
        super().__init__(config.language_model)
        self.vision_tower = TowerHolder(config.vision_tower)
        self.mm_projector = GatedProjector(config)
        self.sampler = Sampler(config)


class ReferenceSlime(ImageTextReference):
    def __init__(self, config: SlimeModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = SlimeBody(config)
        self.lm_head = nn.Linear(config.language_model.hidden_size, config.language_model.vocab_size, bias=False)

    @property
    def transformer(self) -> HfDecoder:
        """The decoder."""
        return self.model

    @property
    def placeholder_id(self) -> int:
        return PLACEHOLDER_ID

    def tower_features(self, pixels: Tensor) -> Tensor:
        """Returns the features of the tower: pixels (N, 3, height, width) -> (N, T, W)."""
        tower = self.model.vision_tower.vision_tower
        return tower.features(self._pixels(pixels), select_layer=self.config.vision_select_layer)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the rows of global views: pixels (N, 3, height, width) -> (N, T, hidden)."""
        return self.model.mm_projector(self.tower_features(pixels))

    def image_rows(self, global_rows: Tensor, local_rows: Tensor) -> Tensor:
        """Returns the rows of a picture: global rows (T, hidden) and local rows (R, hidden) around the separator."""
        if self.config.use != "both":
            return global_rows if self.config.use == "global" else local_rows
        separator = self.model.embed_tokens.weight[self.config.separator_id]
        return torch.cat((global_rows, separator[None], local_rows))

    def router_scores(self, local_rows: Tensor, text_ids: Tensor) -> Tensor:
        """Returns the sum over the text (L,) of the cosines with each local row: (R, hidden) -> (R,)."""
        text = self.model.embed_tokens(text_ids.to(self.device))
        return sum((F.cosine_similarity(local_rows, token[None]) for token in text), local_rows.new_zeros(()))

    def kept(self, scores: Tensor) -> Tensor:
        """Returns the indices of the local rows that the router keeps, ascending: scores (R,) -> (kept,)."""
        router = self.config.router
        likelihoods, order = (scores / router.temperature).softmax(0).sort(descending=True)
        num_below = int((likelihoods.cumsum(0) <= router.top_p).sum())
        return order[: num_below + 1].sort().values

    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        """Writes the rows of pictures (R, hidden) over the placeholders, in order."""
        embeds[input_ids == PLACEHOLDER_ID] = features.to(embeds.dtype)


def retiled(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the rows of crops line by line over all crops: (N, Q, hidden) -> (N * Q, hidden).

    Args:
        rows: those of the crops, line by line.
        grid: columns and lines of the crops.
    """
    columns, lines = grid
    side = math.isqrt(rows.shape[1])
    return rows.reshape(lines, columns, side, side, -1).transpose(1, 2).flatten(0, 3)


def sine_positions(num_queries: int, width: int) -> Tensor:
    """Returns the fixed positions of queries (Q, W), rounded to float16: sines and cosines of column, then of line."""
    side = math.isqrt(num_queries)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    line, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, line)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1).half().float()
