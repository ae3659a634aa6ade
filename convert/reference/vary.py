"""Torch reference of Vary-toy (Wei et al., arXiv 2401.12503; `vary_qwen_vary.py` of the official repository).

B batch, L prompt length, N images, T feature rows per image. The state dict has the official names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mindvlm.convert.reference.clip import ClipTower
from mindvlm.convert.reference.image_text import ImageTextReference
from mindvlm.convert.reference.qwen import QwenDecoder
from mindvlm.convert.reference.random_weights import fill_random
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary_layout import clip_config, has_vision, vocabulary_config


class VaryTransformer(QwenDecoder):
    """Decoder, both towers and both projectors: `transformer.*` of the official state dict."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if has_vision(config):
            clip, vocabulary = clip_config(config), vocabulary_config(config)
            half = config["hidden_size"] // 2
            self.vision_tower = ClipTower(clip)
            self.vision_tower_high = VisionVocabulary(vocabulary)
            self.mm_projector = nn.Linear(clip["hidden_size"], half)
            self.mm_projector_vary = nn.Linear(vocabulary["net_3_channels"], half)


class ReferenceVary(ImageTextReference):
    """Vary-toy, configured by the dict of an official config.json (`vision_config` and `vision_high_config` optional).

    Without towers in the config it is the Qwen-1 language model alone. Both towers always run without gradients.
    Build it with `from_state` or `from_seed`, which never hold the weights twice.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.transformer = VaryTransformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    @torch.no_grad()
    def clip_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) of the CLIP branch -> (N, T, CLIP width)."""
        select_layer = self.config.get("vision_select_layer", -2)
        return self.transformer.vision_tower.features(self._pixels(pixels), select_layer=select_layer)

    @torch.no_grad()
    def vocabulary_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) of the high-resolution branch -> (N, T, net_3_channels)."""
        return self.transformer.vision_tower_high(self._pixels(pixels))

    def project(self, clip: Tensor, vocabulary: Tensor) -> Tensor:
        """Features of both towers (N, T, width) -> (N, T, hidden), channels ordered [CLIP | vocabulary]."""
        projected = self.transformer.mm_projector(clip), self.transformer.mm_projector_vary(vocabulary)
        return torch.cat(projected, dim=-1)

    def encode_images(self, clip_pixels: Tensor, high_pixels: Tensor) -> Tensor:
        """Pixels of both branches (N, 3, height, width) -> rows for the prompt (N, T, hidden)."""
        return self.project(self.clip_features(clip_pixels), self.vocabulary_features(high_pixels))

    @property
    def placeholder_id(self) -> int:
        return self.config["im_patch_token"]

    def place(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> None:
        """Replace the rows between `<img>` and `</img>`; the k-th image goes behind the k-th `<img>`.

        Raises:
            ValueError: unpaired image tokens, a span of another length than T, another number of images than `<img>`.
        """
        for start, feature in zip(*self._spans(input_ids, features), strict=True):
            embeds[start : start + feature.shape[0]] = feature.to(embeds.dtype)

    def _spans(self, ids: Tensor, features: Tensor | None) -> tuple[list[int], list[Tensor]]:
        starts = (ids == self.config["im_start_token"]).nonzero().flatten().tolist()
        num_ends = int((ids == self.config["im_end_token"]).sum())
        num_images = 0 if features is None else len(features)
        if not len(starts) == num_ends == num_images:
            raise ValueError(f"{len(starts)} <img> and {num_ends} </img> tokens for {num_images} images: must be equal")
        length = features.shape[1]
        for start in starts:
            end = start + length + 1
            if end >= len(ids) or int(ids[end]) != self.config["im_end_token"]:
                raise ValueError(f"<img> at {start}: </img> is not {length + 1} tokens behind it")
        return [start + 1 for start in starts], list(features)


def random_state(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the official state dict of `from_seed(config, seed)` as (name, float32 tensor), one at a time."""
    with torch.device("meta"):
        empty = ReferenceVary(config)
    for name, parameter in empty.named_parameters():
        yield name, torch.from_numpy(fill_random(np.empty(tuple(parameter.shape), np.float32), name, seed=seed))


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the official trainer: biases and nn.LayerNorm parameters are not decayed, RMSNorm weights are."""
    layer_norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if "bias" in name or id(parameter) in layer_norms else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
