"""Torch reference of Vary-tiny (Wei et al., arXiv 2312.06109; `vary_opt.py` of the official repository).

B batch, L prompt length, N images, T feature rows per image. The state dict has the official names of the published
weights (`model.vision_tower_2.`), without the tied `lm_head.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.opt import OptDecoder
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary import ReferenceVary
from mindvlm.convert.reference.vary_layout import vocabulary_config

TOWER, OTHER_TOWER = "model.vision_tower_2.", "model.vision_tower."
HEAD, TABLE = "lm_head.weight", "model.decoder.embed_tokens.weight"


class VaryTinyBody(nn.Module):
    """`model.*` of the official state dict."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vocabulary = vocabulary_config(config)
        self.decoder = OptDecoder(config)
        self.vision_tower_2 = VisionVocabulary(vocabulary)
        self.mm_projector = nn.Linear(vocabulary["net_3_channels"], config["hidden_size"])


class ReferenceVaryTiny(ReferenceVary):
    """Vary-tiny, configured by the dict of an official config.json (`vision_high_config` optional).

    Used like `ReferenceVary`, with high-resolution pixels alone in place of its pairs. Gradients reach the vision
    vocabulary. The head is the token embedding; a state dict may have it once more under its own name.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.model = VaryTinyBody(config)

    @classmethod
    def from_state(
        cls,
        config: Mapping[str, Any],
        state: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ReferenceVaryTiny:
        """Build from an official state dict of either spelling of the vision vocabulary; names and shapes must match.

        Raises:
            ValueError: `lm_head.weight` is there and differs from the token embedding.
        """
        if HEAD in state and not torch.equal(state[HEAD], state[TABLE]):
            raise ValueError(f"{HEAD} differs from {TABLE}: the two are one tensor in Vary-tiny")
        tensors = {
            TOWER + name.removeprefix(OTHER_TOWER) if name.startswith(OTHER_TOWER) else name: value
            for name, value in state.items()
            if name != HEAD
        }
        return super().from_state(config, tensors, device=device, dtype=dtype)

    @property
    def transformer(self) -> OptDecoder:
        """The decoder, where `ReferenceVary` has its own."""
        return self.model.decoder

    def vocabulary_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) -> (N, T, net_3_channels)."""
        return self.model.vision_tower_2(self._pixels(pixels))

    def encode_images(self, high_pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) -> rows for the prompt (N, T, hidden)."""
        return self.model.mm_projector(self.vocabulary_features(high_pixels))

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., hidden) -> (..., vocab)."""
        return F.linear(hidden, self.model.decoder.embed_tokens.weight)
