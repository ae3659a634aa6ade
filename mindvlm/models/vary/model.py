"""Vary-toy: two vision towers, two projectors and a Qwen-1 decoder (arXiv 2401.12503).

N images, T tokens an image, B batch, L length, V vocabulary.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.models.common.decoder import CausalLM
from mindvlm.models.common.linear import Linear
from mindvlm.models.common.loss import next_token_loss
from mindvlm.models.common.vit import VisionTransformer
from mindvlm.models.vary.config import VaryModelConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabulary


class VaryModel(nn.Cell):
    """The parts and how they connect. A part whose config is missing is left out (a decoder alone, a tower alone).

    Args:
        config: sizes of the parts.
        dtype: of parameters and activations.
    """

    def __init__(self, config: VaryModelConfig, dtype=ms.float32):
        super().__init__()
        self.config = config
        self.freeze_vision_tower = config.freeze_vision_tower
        if config.language_model:
            self.language_model = CausalLM(config.language_model, dtype)
        if config.vision_tower:
            self.vision_tower = VisionTransformer(
                config.vision_tower, select_layer=config.vision_select_layer, dtype=dtype
            )
        if config.vision_vocabulary:
            self.vision_vocabulary = VisionVocabulary(config.vision_vocabulary, dtype)
        if config.language_model and config.vision_tower and config.vision_vocabulary:
            half = config.language_model.hidden_size // 2
            self.mm_projector = Linear(config.vision_tower.hidden_size, half, dtype=dtype)
            self.mm_projector_vary = Linear(config.vision_vocabulary.net_3_channels, half, dtype=dtype)
            if config.freeze_vision_tower:
                freeze(self.vision_tower)
                freeze(self.vision_vocabulary)

    def tower_features(self, clip_pixels, high_pixels):
        """Features of both towers, (N, T, width) each. clip_pixels and high_pixels (N, 3, height, width)."""
        clip = self.vision_tower(clip_pixels)
        vocabulary = self.vision_vocabulary(high_pixels)
        if self.freeze_vision_tower:
            clip, vocabulary = ops.stop_gradient(clip), ops.stop_gradient(vocabulary)
        return clip, vocabulary

    def encode_images(self, clip_pixels, high_pixels):
        """Image features in the decoder's space, (N, T, hidden): [CLIP | vision vocabulary] on the last axis."""
        clip, vocabulary = self.tower_features(clip_pixels, high_pixels)
        return ops.concat((self.mm_projector(clip), self.mm_projector_vary(vocabulary)), -1)

    def merge(self, input_ids, image_features, sources):
        """Token embeddings with image features in their places.

        Args:
            input_ids: (B, L) int32.
            image_features: (N, T, hidden).
            sources: (B, L) int32 from `splice_sources`: the row of [token embeddings; image features] to take.

        Returns:
            (B, L, hidden).
        """
        embeds = self.language_model.embed_tokens(input_ids)
        hidden_size = embeds.shape[-1]
        rows = ops.concat((embeds.reshape((-1, hidden_size)), image_features.reshape((-1, hidden_size))), 0)
        return ops.gather(rows, sources.reshape((-1,)), 0).reshape(embeds.shape)

    def construct(self, input_ids, labels, inv_freq, clip_pixels, high_pixels, sources):
        """Mean next-token loss of a batch with images; shapes as in `merge`, labels (B, L) with -100 to ignore."""
        embeds = self.merge(input_ids, self.encode_images(clip_pixels, high_pixels), sources)
        return self.text_loss(embeds, labels, inv_freq)

    def text_loss(self, embeds, labels, inv_freq):
        """Mean next-token loss from merged embeddings (B, L, hidden)."""
        logits = self.language_model.lm_head(self.language_model(embeds, inv_freq))
        return next_token_loss(logits, labels)


def freeze(cell: nn.Cell) -> None:
    """Takes a Cell's parameters out of training, weight decay included."""
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
