"""Torch reference of Vary-toy (Wei et al., arXiv 2401.12503; `vary_qwen_vary.py` of the official repository).

B batch, L prompt length, N images, T feature rows per image. The state dict uses the official names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.image_text import ImageTextReference
from mindvlm.convert.reference.qwen import QwenDecoder
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.models.vary.hf_config import ImageTokens
from mindvlm.models.vary.model_config import VaryModelConfig


class VaryTransformer(QwenDecoder):
    """The decoder, both towers and both projectors: `transformer.*` of the official state dict."""

    def __init__(self, config: VaryModelConfig) -> None:
        super().__init__(config.language_model)
        clip, vocabulary = config.vision_tower, config.vision_vocabulary
        if clip and vocabulary:
            half = config.language_model.hidden_size // 2
            self.vision_tower = ClipTower(clip)
            self.vision_tower_high = VisionVocabulary(vocabulary)
            self.mm_projector = nn.Linear(clip.hidden_size, half)
            self.mm_projector_vary = nn.Linear(vocabulary.net_3_channels, half)


class ReferenceVary(ImageTextReference):
    """Vary-toy, or the Qwen-1 language model alone if the config has no towers.

    Both towers run without gradients.

    Attributes:
        image_tokens: ids of the image tokens; must be set before pictures are used.
    """

    def __init__(self, config: VaryModelConfig) -> None:
        super().__init__()
        self.config, self.image_tokens = config, ImageTokens()
        self.transformer = VaryTransformer(config)
        self.lm_head = nn.Linear(config.language_model.hidden_size, config.language_model.vocab_size, bias=False)

    @torch.no_grad()
    def clip_features(self, pixels: Tensor) -> Tensor:
        """Returns CLIP's features: pixels (N, 3, height, width) -> (N, T, CLIP width)."""
        select_layer = self.config.vision_select_layer
        return self.transformer.vision_tower.features(self._pixels(pixels), select_layer=select_layer)

    @torch.no_grad()
    def vocabulary_features(self, pixels: Tensor) -> Tensor:
        """Returns the features of the vision vocabulary: pixels (N, 3, height, width) -> (N, T, net_3_channels)."""
        return self.transformer.vision_tower_high(self._pixels(pixels))

    def project(self, clip: Tensor, vocabulary: Tensor) -> Tensor:
        """Projects the features of both towers: (N, T, width) each -> (N, T, hidden), channels [CLIP | vocabulary]."""
        projected = self.transformer.mm_projector(clip), self.transformer.mm_projector_vary(vocabulary)
        return torch.cat(projected, dim=-1)

    def encode_images(self, clip_pixels: Tensor, high_pixels: Tensor) -> Tensor:
        """Returns the rows of images in the prompt: pixels (N, 3, height, width) each -> (N, T, hidden)."""
        return self.project(self.clip_features(clip_pixels), self.vocabulary_features(high_pixels))

    @property
    def placeholder_id(self) -> int:
        return self.image_tokens.patch

    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        """Replaces the rows between `<img>` and `</img>`; the k-th image goes after the k-th `<img>`.

        Raises:
            ValueError: image tokens are unpaired, a span is not T long, or the numbers of images and `<img>` differ.
        """
        for start, feature in zip(*self._spans(input_ids, features), strict=True):
            embeds[start : start + feature.shape[0]] = feature.to(embeds.dtype)

    def _spans(self, ids: Tensor, features: Tensor | None) -> tuple[list[int], list[Tensor]]:
        starts = (ids == self.image_tokens.start).nonzero().flatten().tolist()
        num_ends = int((ids == self.image_tokens.end).sum())
        num_images = 0 if features is None else len(features)
        if not len(starts) == num_ends == num_images:
            raise ValueError(f"{len(starts)} <img> and {num_ends} </img> tokens for {num_images} images: must be equal")
        length = features.shape[1]
        for start in starts:
            end = start + length + 1
            if end >= len(ids) or int(ids[end]) != self.image_tokens.end:
                raise ValueError(f"<img> at {start}: </img> is not {length + 1} tokens after it")
        return [start + 1 for start in starts], list(features)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the AdamW groups of the official trainer. Biases and LayerNorm have no weight decay; RMSNorm has."""
    layer_norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if "bias" in name or id(parameter) in layer_norms else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
