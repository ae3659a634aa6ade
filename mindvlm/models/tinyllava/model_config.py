"""Which parts a TinyLLaVA model has and of what size; impossible sizes are errors that name the key."""

from dataclasses import dataclass, field

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.connector import ConnectorConfig
from mindvlm.nn.checks import check_language_model, check_vision_tower
from mindvlm.nn.decoder import DecoderConfig
from mindvlm.nn.patches import grid_size
from mindvlm.nn.vit import VitConfig


@dataclass(kw_only=True)
class TuneConfig:
    """What training changes.

    Attributes:
        connector: the connector, and the row that ends lines (`image_newline`) with it.
        vision_tower_from_layer: the tower's layers from this one on; -1 for the whole tower with its embeddings, null
            for none.
        embed_tokens: the token embeddings though the decoder is frozen; the head stays as it is.
    """

    language_model: bool = True
    connector: bool = True
    vision_tower_from_layer: int | None = None
    embed_tokens: bool = False

    def __post_init__(self):
        if self.embed_tokens and self.language_model:
            raise UserError(
                "model.tune.embed_tokens is true but model.tune.language_model trains the embeddings with the decoder; "
                "take the first out, or set the second to false"
            )


@dataclass(kw_only=True)
class TinyLlavaModelConfig:
    """The parts of a TinyLLaVA model; a part that is None is left out.

    Attributes:
        vision_select_layer: which of [embeddings, after layer 0, ...] of the tower is the feature.
        num_dropped_tokens: tokens in front of the features that are none: 1 for CLIP's class token.
        image_token_len: feature rows, and placeholders, of an image, or of each tile of one.
        image_newline: a learned row that ends each line of feature rows of a picture in tiles.
        max_length: the longest prompt plus answer in tokens, image features included.
        padding_token_id: the token whose embedding does not learn; null for none.
        tune: what training changes.
    """

    language_model: DecoderConfig | None
    vision_tower: VitConfig | None
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    vision_select_layer: int = -1
    num_dropped_tokens: int = 0
    image_token_len: int = 729
    image_newline: bool = False
    max_length: int = 2048
    padding_token_id: int | None = None
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self):
        lm, vit = self.language_model, self.vision_tower
        if lm:
            check_language_model(lm, max_length=self.max_length)
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if vit:
            self.check_tower(vit)

    def check_tower(self, vit: VitConfig) -> None:
        check_vision_tower(vit, self.vision_select_layer)
        if not 0 <= self.num_dropped_tokens < num_tower_tokens(vit):
            raise UserError(
                f"model.num_dropped_tokens is {self.num_dropped_tokens}; the tower gives {num_tower_tokens(vit)} tokens"
            )
        found = self.connector.num_tokens(num_tower_tokens(vit) - self.num_dropped_tokens)
        if self.image_token_len != found:
            raise UserError(
                f"model.image_token_len is {self.image_token_len} but tower and connector give {found} tokens an "
                f"image; set it to {found}"
            )
        first = self.tune.vision_tower_from_layer
        if first is not None and not -1 <= first <= vit.num_hidden_layers:
            raise UserError(
                f"model.tune.vision_tower_from_layer is {first}; expected -1 (all), 0..{vit.num_hidden_layers} or null"
            )


def num_tower_tokens(vit: VitConfig) -> int:
    """Tokens of an image in the tower, CLIP's class token included."""
    rows, columns = grid_size(vit.image_size, vit.patch_size)
    return rows * columns + (vit.dialect == "clip")
