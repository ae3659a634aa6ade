"""TinyLLaVA: a vision tower, a connector and a small decoder (arXiv 2402.14289).

N images, T tokens an image, B batch, L length, V vocabulary.
"""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.models.tinyllava.model_config import ConnectorConfig, TinyLlavaModelConfig, TuneConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.linear import Linear
from mindvlm.nn.mlp import activation
from mindvlm.nn.parameters import freeze
from mindvlm.nn.resampler import Resampler
from mindvlm.nn.vit import TOWERS, VisionTransformer


class TinyLlavaModel(ImageTextModel):
    """A vision tower, a connector and a decoder. Parts without a config are absent (a decoder alone, a tower alone).

    Args:
        config: sizes of the parts, and which of them train.
        context: dtype and attention.
    """

    freezing_keys = ("model.tune.language_model", "model.tune.connector", "model.tune.vision_tower_from_layer")

    def __init__(self, config: TinyLlavaModelConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        dtype = context.dtype
        self.config = config
        if config.language_model:
            self.language_model = CausalLM(config.language_model, context)
        padding = config.padding_token_id
        self.learned_embeddings = AllRows() if padding is None else WithoutGradientAt(padding)
        self.freeze_vision_tower = config.tune.vision_tower_from_layer is None
        if config.vision_tower:
            self.vision_tower = TOWERS[config.vision_tower.dialect](
                config.vision_tower,
                context,
                select_layer=config.vision_select_layer,
                num_dropped_tokens=config.num_dropped_tokens,
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
        """The vision tower, or an empty list."""
        return [self.vision_tower] if self.config.vision_tower else []

    @property
    def recomputed_tower(self) -> VisionTransformer:
        """The vision tower."""
        return self.vision_tower

    def embed(self, input_ids):
        """Returns token embeddings (B, L, hidden). Placeholder ids may be negative; `merge` replaces their rows."""
        ids = ops.maximum(input_ids, Tensor(0, ms.int32))
        return self.learned_embeddings(self.language_model.embed_tokens(ids), ids)

    def last_row(self):
        """Returns the learned row that ends lines, (1, hidden); None if the model has none."""
        return self.image_newline.reshape((1, -1)) if self.config.image_newline else None

    def tower_features(self, pixels):
        """Returns the features of the tower: pixels (N, 3, height, width) -> (N, T, width)."""
        features = self.vision_tower(pixels)
        return ops.stop_gradient(features) if self.freeze_vision_tower else features

    def encode_images(self, pixels):
        """Returns image features as decoder inputs, (N, T, hidden)."""
        return self.mm_projector(self.tower_features(pixels))

    def features_behind_blocks(self, states, pixels):
        """Returns the result of `encode_images` from the output of the last block of the tower."""
        return self.mm_projector(self.vision_tower.finish(states))


def build_connector(config: ConnectorConfig, image_width: int, hidden_size: int, dtype=ms.float32) -> nn.Cell:
    """Returns the connector: features (N, T, image_width) -> (N, T or queries, hidden_size).

    Raises:
        UserError: the type is "identity" but the two widths differ.
    """
    if config.type == "linear":
        return Linear(image_width, hidden_size, dtype=dtype)
    if config.type == "resampler":
        return Resampler(
            image_width,
            width=config.resampler_hidden_size,
            out_width=hidden_size,
            num_queries=config.num_queries,
            num_layers=config.num_resampler_layers,
            num_heads=config.num_heads,
            dtype=dtype,
        )
    if config.type == "identity":
        if image_width != hidden_size:
            raise UserError(
                f"connector type is 'identity' but the tower's features have {image_width} channels and the decoder "
                f"{hidden_size}; choose another type"
            )
        return nn.Identity()
    cells = [Linear(image_width, hidden_size, dtype=dtype)]
    for _ in range(config.num_linears - 1):
        cells += [activation("gelu"), Linear(hidden_size, hidden_size, dtype=dtype)]
    return nn.SequentialCell(cells)


class AllRows(nn.Cell):
    """Returns embedding rows unchanged, with all gradients."""

    def construct(self, rows, ids):
        return rows


class WithoutGradientAt(nn.Cell):
    """Returns embedding rows unchanged and stops the gradient of one id (`padding_idx` of torch's Embedding)."""

    def __init__(self, token_id: int):
        super().__init__()
        self.token_id = token_id

    def construct(self, rows, ids):
        """rows (B, L, hidden), ids (B, L) int32 -> rows."""
        kept = ops.broadcast_to(ops.expand_dims(ids != self.token_id, -1), rows.shape)
        return ops.select(kept, rows, ops.stop_gradient(rows))


def freeze_parts(model: TinyLlavaModel, tune: TuneConfig) -> None:
    """Freezes the parameters that the config does not tune, and those that do not affect the features."""
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
    for parameter in tower.unused_parameters():
        parameter.requires_grad = False
    if first >= 0:
        for parameter in tower.get_parameters():
            parameter.requires_grad = parameter.requires_grad and ".encoder." in f".{parameter.name}"
        for layer in list(tower.encoder.layers)[:first]:
            freeze(layer)


def build_model(config: TinyLlavaModelConfig, context: BuildContext = EAGER_FLOAT32) -> TinyLlavaModel:
    """Returns the model of a config."""
    return TinyLlavaModel(config, context)
