"""Vary-toy: two vision towers, two projectors and a Qwen-1 decoder (arXiv 2401.12503). Vary-tiny: the vision
vocabulary, one projector and an OPT decoder (arXiv 2312.06109).

N images, T tokens an image, B batch, L length, V vocabulary.
"""

import mindspore as ms
from mindspore import nn, ops

from mindvlm.models.vary.config import VaryModelConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabulary
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.image_text import ImageTextModel, freeze
from mindvlm.nn.linear import Linear
from mindvlm.nn.vit import VisionTransformer


class VaryModel(ImageTextModel):
    """Vary-toy's parts and how they connect. A part whose config is missing is left out (a decoder alone, a tower
    alone).

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

    @property
    def recomputed_tower(self) -> VisionVocabulary:
        """The larger tower."""
        return self.vision_vocabulary

    @property
    def towers(self) -> list[nn.Cell]:
        """The vision towers that there are."""
        towers = (("vision_tower", self.config.vision_tower), ("vision_vocabulary", self.config.vision_vocabulary))
        return [getattr(self, name) for name, config in towers if config]

    def tower_features(self, clip_pixels, high_pixels):
        """Features of both towers, (N, T, width) each. clip_pixels and high_pixels (N, 3, height, width)."""
        clip = self.vision_tower(clip_pixels)
        vocabulary = self.vision_vocabulary(high_pixels)
        if self.freeze_vision_tower:
            clip, vocabulary = ops.stop_gradient(clip), ops.stop_gradient(vocabulary)
        return clip, vocabulary

    def encode_images(self, clip_pixels, high_pixels):
        """Image features in the decoder's space, (N, T, hidden): [CLIP | vision vocabulary] on the last axis."""
        return self.project(*self.tower_features(clip_pixels, high_pixels))

    def features_behind_blocks(self, states, clip_pixels, high_pixels):
        """As `encode_images`, from what the last block of the vision vocabulary gives."""
        return self.project(self.vision_tower(clip_pixels), self.vision_vocabulary.finish(states)[-1])

    def project(self, clip, vocabulary):
        """Both features in the decoder's space, side by side."""
        return ops.concat((self.mm_projector(clip), self.mm_projector_vary(vocabulary)), -1)

    def construct(self, input_ids, labels, inv_freq, clip_pixels, high_pixels, sources):
        """Sum of the next-token losses of a batch with images, and their number; shapes as in `merge`, `text_loss`."""
        embeds = self.merge(input_ids, self.encode_images(clip_pixels, high_pixels), sources)
        return self.text_loss(embeds, labels, inv_freq)


class VaryTinyModel(ImageTextModel):
    """Vary-tiny: what trains a vision vocabulary. Without `freeze_vision_tower` gradients reach the tower.

    Args:
        config: sizes of the parts, without a `vision_tower`.
        dtype: of parameters and activations.
    """

    def __init__(self, config: VaryModelConfig, dtype=ms.float32):
        super().__init__()
        self.config = config
        self.freeze_vision_tower = config.freeze_vision_tower
        self.language_model = CausalLM(config.language_model, dtype)
        self.vision_vocabulary = VisionVocabulary(config.vision_vocabulary, dtype)
        width = config.vision_vocabulary.net_3_channels
        self.mm_projector = Linear(width, config.language_model.hidden_size, dtype=dtype)
        if config.freeze_vision_tower:
            freeze(self.vision_vocabulary)

    @property
    def recomputed_tower(self) -> VisionVocabulary:
        """The only tower."""
        return self.vision_vocabulary

    @property
    def towers(self) -> list[nn.Cell]:
        """The vision tower that there is."""
        return [self.vision_vocabulary]

    def tower_features(self, high_pixels):
        """Features of the vision vocabulary, (N, T, width). high_pixels (N, 3, height, width)."""
        vocabulary = self.vision_vocabulary(high_pixels)
        return ops.stop_gradient(vocabulary) if self.freeze_vision_tower else vocabulary

    def encode_images(self, high_pixels):
        """Image features in the decoder's space, (N, T, hidden)."""
        return self.mm_projector(self.tower_features(high_pixels))

    def features_behind_blocks(self, states, high_pixels):
        """As `encode_images`, from what the last block of the vision vocabulary gives."""
        return self.mm_projector(self.vision_vocabulary.finish(states)[-1])

    def construct(self, input_ids, labels, inv_freq, high_pixels, sources):
        """Sum of the next-token losses of a batch with images, and their number; shapes as in `merge`, `text_loss`."""
        return self.text_loss(self.merge(input_ids, self.encode_images(high_pixels), sources), labels, inv_freq)


def build_model(config: VaryModelConfig, dtype=ms.float32) -> VaryModel | VaryTinyModel:
    """The Cell of a config: Vary-tiny where a decoder and a vision vocabulary come without a CLIP tower."""
    return VaryTinyModel(config, dtype) if config.is_tiny else VaryModel(config, dtype)
