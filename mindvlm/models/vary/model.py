"""Vary-toy: two vision towers, two projectors and a Qwen-1 decoder (arXiv 2401.12503).
Vary-tiny: the vision vocabulary, one projector and an OPT decoder (arXiv 2312.06109).

N images, T tokens an image, B batch, L length, V vocabulary.
"""

from mindspore import nn, ops

from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.models.vary.model_config import VaryModelConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabulary
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.linear import Linear
from mindvlm.nn.parameters import freeze
from mindvlm.nn.vit import VisionTransformer


class VaryModel(ImageTextModel):
    """Vary-toy. Parts without a config are absent (a decoder alone, a tower alone).

    Args:
        config: sizes of the parts.
        context: dtype and attention.
    """

    recomputed_pixels = 1
    freezing_keys = ("model.freeze_vision_tower",)

    def __init__(self, config: VaryModelConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.config = config
        self.freeze_vision_tower = config.freeze_vision_tower
        if config.language_model:
            self.language_model = CausalLM(config.language_model, context)
        if config.vision_tower:
            self.vision_tower = VisionTransformer(config.vision_tower, context, select_layer=config.vision_select_layer)
        if config.vision_vocabulary:
            self.vision_vocabulary = VisionVocabulary(config.vision_vocabulary, context)
        if config.language_model and config.vision_tower and config.vision_vocabulary:
            half = config.language_model.hidden_size // 2
            self.mm_projector = Linear(config.vision_tower.hidden_size, half, dtype=context.dtype)
            self.mm_projector_vary = Linear(config.vision_vocabulary.net_3_channels, half, dtype=context.dtype)
            if config.freeze_vision_tower:
                freeze(self.vision_tower)
                freeze(self.vision_vocabulary)

    @property
    def recomputed_tower(self) -> VisionVocabulary:
        """The larger tower."""
        return self.vision_vocabulary

    @property
    def towers(self) -> list[nn.Cell]:
        """The vision towers of the model."""
        towers = (("vision_tower", self.config.vision_tower), ("vision_vocabulary", self.config.vision_vocabulary))
        return [getattr(self, name) for name, config in towers if config]

    def tower_features(self, clip_pixels, high_pixels):
        """Returns the features of both towers: pixels (N, 3, height, width) each -> (N, T, width) each."""
        clip = self.vision_tower(clip_pixels)
        vocabulary = self.vision_vocabulary(high_pixels)
        if self.freeze_vision_tower:
            clip, vocabulary = ops.stop_gradient(clip), ops.stop_gradient(vocabulary)
        return clip, vocabulary

    def encode_images(self, clip_pixels, high_pixels):
        """Returns image features as decoder inputs, (N, T, hidden): [CLIP | vision vocabulary] on the last axis."""
        return self.project(*self.tower_features(clip_pixels, high_pixels))

    def features_behind_blocks(self, states, clip_pixels, high_pixels):
        """Returns the result of `encode_images` from the output of the last block of the vision vocabulary."""
        return self.project(self.vision_tower(clip_pixels), self.vision_vocabulary.finish(states)[-1])

    def project(self, clip, vocabulary):
        """Projects both features to half the hidden size each and concatenates them, (N, T, hidden)."""
        return ops.concat((self.mm_projector(clip), self.mm_projector_vary(vocabulary)), -1)


class VaryTinyModel(ImageTextModel):
    """Vary-tiny, the model that pretrains a vision vocabulary. `freeze_vision_tower: false` trains the tower.

    Args:
        config: sizes of the parts, without a `vision_tower`.
        context: dtype and attention.
    """

    freezing_keys = ("model.freeze_vision_tower",)

    def __init__(self, config: VaryModelConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.config = config
        self.freeze_vision_tower = config.freeze_vision_tower
        self.language_model = CausalLM(config.language_model, context)
        self.vision_vocabulary = VisionVocabulary(config.vision_vocabulary, context)
        width = config.vision_vocabulary.net_3_channels
        self.mm_projector = Linear(width, config.language_model.hidden_size, dtype=context.dtype)
        if config.freeze_vision_tower:
            freeze(self.vision_vocabulary)

    @property
    def recomputed_tower(self) -> VisionVocabulary:
        """The vision vocabulary."""
        return self.vision_vocabulary

    @property
    def towers(self) -> list[nn.Cell]:
        """The vision vocabulary."""
        return [self.vision_vocabulary]

    def tower_features(self, high_pixels):
        """Returns the features of the vision vocabulary: pixels (N, 3, height, width) -> (N, T, width)."""
        vocabulary = self.vision_vocabulary(high_pixels)
        return ops.stop_gradient(vocabulary) if self.freeze_vision_tower else vocabulary

    def encode_images(self, high_pixels):
        """Returns image features as decoder inputs, (N, T, hidden)."""
        return self.mm_projector(self.tower_features(high_pixels))

    def features_behind_blocks(self, states, high_pixels):
        """Returns the result of `encode_images` from the output of the last block of the vision vocabulary."""
        return self.mm_projector(self.vision_vocabulary.finish(states)[-1])


def build_model(config: VaryModelConfig, context: BuildContext = EAGER_FLOAT32) -> VaryModel | VaryTinyModel:
    """Returns the model of a config: Vary-tiny for a decoder and a vision vocabulary without CLIP."""
    return VaryTinyModel(config, context) if config.is_tiny else VaryModel(config, context)
