"""Torch reference of Vary-tiny (Wei et al., arXiv 2312.06109; `vary_opt.py` of the official repository).

B batch, L prompt length, N images, T feature rows per image. The state dict uses the names of the published weights
(`model.vision_tower_2.`), without the tied `lm_head.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindvlm.convert.reference.opt import OptDecoder
from mindvlm.convert.reference.sam import VisionVocabulary
from mindvlm.convert.reference.vary import ReferenceVary
from mindvlm.models.vary.hf_config import ImageTokens
from mindvlm.models.vary.model_config import VaryModelConfig

TOWER, OTHER_TOWER = "model.vision_tower_2.", "model.vision_tower."
HEAD, TABLE = "lm_head.weight", "model.decoder.embed_tokens.weight"


class VaryTinyBody(nn.Module):
    """`model.*` of the official state dict."""

    def __init__(self, config: VaryModelConfig) -> None:
        super().__init__()
        self.decoder = OptDecoder(config.language_model)
        if config.vision_vocabulary:
            self.vision_tower_2 = VisionVocabulary(config.vision_vocabulary)
            self.mm_projector = nn.Linear(config.vision_vocabulary.net_3_channels, config.language_model.hidden_size)


class ReferenceVaryTiny(ReferenceVary):
    """Vary-tiny, or the OPT decoder alone if the config has no vision vocabulary.

    Images are high-resolution pixels only. Gradients reach the vision vocabulary. The head is the token embedding; a
    state dict may also contain it under its own name.
    """

    def __init__(self, config: VaryModelConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.image_tokens = config, ImageTokens()
        self.model = VaryTinyBody(config)

    @classmethod
    def from_state(
        cls,
        config: VaryModelConfig,
        state: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ReferenceVaryTiny:
        """Builds the model from an official state dict with either name of the vision vocabulary.

        Raises:
            ValueError: `lm_head.weight` differs from the token embedding.
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
        """The decoder."""
        return self.model.decoder

    def vocabulary_features(self, pixels: Tensor) -> Tensor:
        """Returns the features of the vision vocabulary: pixels (N, 3, height, width) -> (N, T, net_3_channels)."""
        return self.model.vision_tower_2(self._pixels(pixels))

    def encode_images(self, high_pixels: Tensor) -> Tensor:
        """Returns the rows of images in the prompt: pixels (N, 3, height, width) -> (N, T, hidden)."""
        return self.model.mm_projector(self.vocabulary_features(high_pixels))

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits of normed hidden states: (..., hidden) -> (..., vocab)."""
        return F.linear(hidden, self.model.decoder.embed_tokens.weight)
