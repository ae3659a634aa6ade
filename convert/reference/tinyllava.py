"""Torch reference of TinyLLaVA (Zhou et al., arXiv 2402.14289; TinyLLaVABench): tower, connector, decoder.

B batch, L prompt length, N images, T feature rows per image. The state dict uses TinyLLaVABench's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindvlm.convert.reference.clip import TowerHolder
from mindvlm.convert.reference.connectors import build_connector
from mindvlm.convert.reference.hf_decoder import HfDecoder
from mindvlm.convert.reference.image_text import ImageTextReference
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID


class TinyLlavaBody(HfDecoder):
    """`model.*` of the official state dict, without `image_newline`."""

    def __init__(self, config: TinyLlavaModelConfig) -> None:
        lm, vit = config.language_model, config.vision_tower
        super().__init__(lm)
        if vit:
            self.vision_tower = TowerHolder(vit)
            self.mm_projector = build_connector(config.connector, vit.hidden_size, lm.hidden_size)


class ReferenceTinyLlava(ImageTextReference):
    """A TinyLLaVA with any decoder, tower and connector, or a decoder alone if the config has no tower."""

    def __init__(self, config: TinyLlavaModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TinyLlavaBody(config)
        lm = config.language_model
        self.lm_head = nn.Linear(lm.hidden_size, lm.vocab_size, bias=lm.head_bias)

    @property
    def transformer(self) -> HfDecoder:
        """The decoder."""
        return self.model

    @property
    def placeholder_id(self) -> int:
        return PLACEHOLDER_ID

    @torch.no_grad()
    def tower_features(self, pixels: Tensor) -> Tensor:
        """Returns the features of the tower: pixels (N, 3, height, width) -> (N, tokens, tower width)."""
        return self.model.vision_tower.vision_tower.features(
            self._pixels(pixels),
            select_layer=self.config.vision_select_layer,
            num_dropped_tokens=self.config.num_dropped_tokens,
        )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the rows of images in the prompt: pixels (N, 3, height, width) -> (N, T, hidden)."""
        return self.model.mm_projector(self.tower_features(pixels))

    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        """Writes one feature row over each placeholder, in order.

        Raises:
            ValueError: the numbers of placeholders and rows differ.
        """
        rows = embeds[:0] if features is None else features.flatten(0, 1)
        places = (input_ids == PLACEHOLDER_ID).nonzero().flatten()
        if len(places) != len(rows):
            raise ValueError(f"{len(places)} image placeholders for {len(rows)} feature rows: must be equal")
        embeds[places] = rows.to(embeds.dtype)
