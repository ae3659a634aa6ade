"""TinyLLaVA: a vision tower, a connector and a small decoder (arXiv 2402.14289).

N images, T tokens an image, B batch, L length, V vocabulary.
"""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.models.tinyllava.connector import build_connector
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig, TuneConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.image_text import ImageTextModel, freeze
from mindvlm.nn.vit import TOWERS, VisionTransformer


class TinyLlavaModel(ImageTextModel):
    """The parts and how they connect. A part whose config is missing is left out (a decoder alone, a tower alone).

    Args:
        config: sizes of the parts, and which of them learn.
        dtype: of parameters and activations.
    """

    def __init__(self, config: TinyLlavaModelConfig, dtype=ms.float32):
        super().__init__()
        self.config = config
        if config.language_model:
            self.language_model = CausalLM(config.language_model, dtype)
        padding = config.padding_token_id
        self.learned_embeddings = AllRows() if padding is None else WithoutGradientAt(padding)
        self.freeze_vision_tower = config.tune.vision_tower_from_layer is None
        if config.vision_tower:
            self.vision_tower = TOWERS[config.vision_tower.dialect](
                config.vision_tower,
                select_layer=config.vision_select_layer,
                num_dropped_tokens=config.num_dropped_tokens,
                dtype=dtype,
            )
        if config.language_model and config.vision_tower:
            width = config.vision_tower.hidden_size
            self.mm_projector = build_connector(config.connector, width, config.language_model.hidden_size, dtype)
        if config.image_newline:
            shape = (config.language_model.hidden_size,)
            self.image_newline = Parameter(initializer("zeros", shape, dtype), name="image_newline")
        freeze_parts(self, config.tune)

    @property
    def towers(self) -> list[nn.Cell]:
        """The vision tower, if there is one."""
        return [self.vision_tower] if self.config.vision_tower else []

    @property
    def recomputed_tower(self) -> VisionTransformer:
        """The only tower."""
        return self.vision_tower

    def embed(self, input_ids):
        """Token embeddings (B, L, hidden); the ids of placeholders may be negative, they are replaced later."""
        ids = ops.maximum(input_ids, Tensor(0, ms.int32))
        return self.learned_embeddings(self.language_model.embed_tokens(ids), ids)

    def merge(self, input_ids, image_features, sources):
        """As that of every family; the learned row that ends lines is the row behind the image features."""
        if self.config.image_newline:
            rows = image_features.reshape((-1, image_features.shape[-1]))
            image_features = ops.concat((rows, self.image_newline.reshape((1, -1))), 0)
        return super().merge(input_ids, image_features, sources)

    def tower_features(self, pixels):
        """Features of the tower, (N, T, width). pixels (N, 3, height, width)."""
        features = self.vision_tower(pixels)
        return ops.stop_gradient(features) if self.freeze_vision_tower else features

    def encode_images(self, pixels):
        """Image features in the decoder's space, (N, T, hidden)."""
        return self.mm_projector(self.tower_features(pixels))

    def features_behind_blocks(self, states, pixels):
        """As `encode_images`, from what the last of the tower's blocks gives."""
        return self.mm_projector(self.vision_tower.finish(states))

    def construct(self, input_ids, labels, inv_freq, pixels, sources):
        """Sum of the next-token losses of a batch with images, and their number; shapes as in `merge`, `text_loss`."""
        return self.text_loss(self.merge(input_ids, self.encode_images(pixels), sources), labels, inv_freq)


class AllRows(nn.Cell):
    """Rows of a table as they are, each with its gradient."""

    def construct(self, rows, ids):
        return rows


class WithoutGradientAt(nn.Cell):
    """Rows of a table as they are, without a gradient for the row of one id (`padding_idx` of torch's Embedding)."""

    def __init__(self, token_id: int):
        super().__init__()
        self.token_id = token_id

    def construct(self, rows, ids):
        """rows (B, L, hidden), ids (B, L) int32 -> rows."""
        kept = ops.broadcast_to(ops.expand_dims(ids != self.token_id, -1), rows.shape)
        return ops.select(kept, rows, ops.stop_gradient(rows))


def freeze_parts(model: TinyLlavaModel, tune: TuneConfig) -> None:
    """Takes out of training what the config does not tune, and what has no part in the features."""
    if model.config.language_model and not tune.language_model:
        freeze(model.language_model)
        model.language_model.embed_tokens.weight.requires_grad = tune.embed_tokens
    if not tune.connector:
        if model.config.language_model and model.config.vision_tower:
            freeze(model.mm_projector)
        if model.config.image_newline:
            model.image_newline.requires_grad = False
    if not model.config.vision_tower:
        return
    tower, first = model.vision_tower, tune.vision_tower_from_layer
    if first is None:
        freeze(tower)
        return
    for cell in tower.unused_cells():
        freeze(cell)
    if first >= 0:
        for parameter in tower.get_parameters():
            parameter.requires_grad = parameter.requires_grad and ".encoder." in f".{parameter.name}"
        for layer in list(tower.encoder.layers)[:first]:
            freeze(layer)


def build_model(config: TinyLlavaModelConfig, dtype=ms.float32) -> TinyLlavaModel:
    """The Cell of a config."""
    return TinyLlavaModel(config, dtype)
