"""Torch reference of TinyLLaVA (Zhou et al., arXiv 2402.14289; TinyLLaVABench): tower, connector, decoder.

B batch, L prompt length, N images, T feature rows per image. The state dict has TinyLLaVABench's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mindvlm.convert.reference.clip import ClipTower, SiglipTower, VisionTower
from mindvlm.convert.reference.connectors import build_connector
from mindvlm.convert.reference.image_text import ImageTextReference
from mindvlm.convert.reference.tinyllava_decoder import TinyLlavaDecoder
from mindvlm.convert.reference.tinyllava_form import image_feature
from mindvlm.convert.reference.tinyllava_layout import is_siglip, tower_sizes
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID


def build_tower(tower: Mapping[str, Any]) -> VisionTower:
    """The tower of a tower repository's config.json; see `tower_sizes` for its last layer."""
    return (SiglipTower if is_siglip(tower) else ClipTower)(tower_sizes(tower))


class TowerHolder(nn.Module):
    """One more level of names."""

    def __init__(self, tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.vision_tower = build_tower(tower)


class TinyLlavaBody(TinyLlavaDecoder):
    """`model.*` of the official state dict."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if "vision_config" in config:
            self.vision_tower = TowerHolder(config["vision_config"])
            self.mm_projector = build_connector(config, tower_sizes(config["vision_config"])["hidden_size"])


class ReferenceTinyLlava(ImageTextReference):
    """A TinyLLaVA with any of its decoders, towers and connectors; without a tower in the config its decoder alone.

    Args:
        config: a config.json in the form of `tinyllava_form.bench_form`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = TinyLlavaBody(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=config.get("head_bias", False))

    @property
    def transformer(self) -> TinyLlavaDecoder:
        """The decoder, where `ReferenceVary` has its own."""
        return self.model

    @property
    def placeholder_id(self) -> int:
        return PLACEHOLDER_ID

    @torch.no_grad()
    def tower_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) -> (N, tokens, tower width)."""
        select_layer, num_dropped_tokens = image_feature(self.config)
        return self.model.vision_tower.vision_tower.features(
            self._pixels(pixels), select_layer=select_layer, num_dropped_tokens=num_dropped_tokens
        )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) -> rows for the prompt (N, T, hidden)."""
        return self.model.mm_projector(self.tower_features(pixels))

    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        """Fill the placeholders, one for each row of features, in order.

        Raises:
            ValueError: there are more or fewer of them than rows.
        """
        rows = embeds[:0] if features is None else features.flatten(0, 1)
        places = (input_ids == PLACEHOLDER_ID).nonzero().flatten()
        if len(places) != len(rows):
            raise ValueError(f"{len(places)} image placeholders for {len(rows)} feature rows: must be equal")
        embeds[places] = rows.to(embeds.dtype)
