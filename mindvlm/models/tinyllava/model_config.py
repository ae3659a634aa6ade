"""The typed config of a TinyLLaVA model, its checks, and the shapes of its parameters. Needs no framework."""

import re
from dataclasses import InitVar, dataclass, field

from mindvlm.core.errors import UserError
from mindvlm.nn.config import DecoderConfig, VitConfig, check_language_model, check_vision_tower
from mindvlm.nn.shapes import Shapes, decoder_shapes, linear_shapes, resampler_shapes, vit_shapes

MAX_MLP_LAYERS = 8
# as in the original program: 12 heads, or 8 if the width is 512
RESAMPLER_HEADS, RESAMPLER_512_HEADS = 12, 8


@dataclass(kw_only=True)
class ConnectorConfig:
    """The type of the connector and the sizes of a resampler.

    Attributes:
        type: "linear"; "mlpNx_gelu", N Linears with exact GELUs between them; "resampler"; or "identity".
    """

    type: str = "mlp2x_gelu"
    resampler_hidden_size: int = 768
    num_queries: int = 128
    num_resampler_layers: int = 3

    def __post_init__(self):
        if self.type not in ("linear", "resampler", "identity") and not 1 <= self.num_linears <= MAX_MLP_LAYERS:
            raise UserError(
                f"connector type is {self.type!r}; expected linear, mlpNx_gelu with N from 1 to {MAX_MLP_LAYERS}, "
                "resampler or identity"
            )
        if self.type == "resampler":
            sizes = (self.resampler_hidden_size, self.num_queries, self.num_resampler_layers)
            if min(sizes) < 1:
                raise UserError(
                    f"connector: resampler_hidden_size is {sizes[0]}, num_queries {sizes[1]}, num_resampler_layers "
                    f"{sizes[2]}; expected at least 1 each"
                )

    @property
    def num_linears(self) -> int:
        """The N of mlpNx_gelu, 0 for other types."""
        found = re.fullmatch(r"mlp(\d{1,3})x_gelu", self.type)
        return int(found.group(1)) if found else 0

    @property
    def num_heads(self) -> int:
        return RESAMPLER_512_HEADS if self.resampler_hidden_size == 512 else RESAMPLER_HEADS

    def num_tokens(self, num_features: int) -> int:
        """Returns the number of tokens of an image with `num_features` feature rows."""
        return self.num_queries if self.type == "resampler" else num_features


@dataclass(kw_only=True)
class TuneConfig:
    """The parts that training updates.

    Attributes:
        connector: the connector and the row that ends lines (`image_newline`).
        vision_tower_from_layer: first layer of the tower to train; -1 for the whole tower with its embeddings, null
            for none.
        embed_tokens: the token embeddings of a frozen decoder; the head stays frozen.
    """

    language_model: bool = True
    connector: bool = True
    vision_tower_from_layer: int | None = None
    embed_tokens: bool = False

    def __post_init__(self):
        if self.embed_tokens and self.language_model:
            raise UserError(
                "model.tune.embed_tokens is true but model.tune.language_model trains the embeddings with the decoder; "
                "remove the first, or set the second to false"
            )


@dataclass(kw_only=True)
class TinyLlavaModelConfig:
    """The parts of a TinyLLaVA model. A part that is None is absent.

    Attributes:
        vision_select_layer: index of the features among the hidden states [embeddings, output of layer 0, ...].
        num_dropped_tokens: number of leading tokens that are not features: 1 for CLIP's class token.
        image_token_len: number of feature rows, and placeholders, per image or per tile.
        image_newline: whether a learned row ends each line of feature rows of a tiled picture.
        max_length: limit of prompt plus answer in tokens, image features included.
        padding_token_id: token whose embedding gets no gradient; null for none.
        tune: the parts that training updates.
        validate: whether to check that the model can run; if False, the config only describes tensor sizes.
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
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool):
        if not validate:
            return
        lm, vit, connector = self.language_model, self.vision_tower, self.connector
        if lm:
            check_language_model(lm, max_length=self.max_length)
        if connector.type == "resampler" and connector.resampler_hidden_size % connector.num_heads:
            raise UserError(
                f"model.connector.resampler_hidden_size is {connector.resampler_hidden_size}; expected a multiple of "
                f"{connector.num_heads} heads"
            )
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if vit:
            self.check_tower(vit)

    def check_tower(self, vit: VitConfig) -> None:
        check_vision_tower(vit, self.vision_select_layer)
        if not 0 <= self.num_dropped_tokens < vit.num_tokens:
            raise UserError(
                f"model.num_dropped_tokens is {self.num_dropped_tokens}; expected less than the "
                f"{vit.num_tokens} tokens of the tower"
            )
        found = self.connector.num_tokens(vit.num_tokens - self.num_dropped_tokens)
        if self.image_token_len != found:
            raise UserError(
                f"model.image_token_len is {self.image_token_len} but tower and connector output {found} tokens per "
                f"image; set it to {found}"
            )
        first = self.tune.vision_tower_from_layer
        if first is not None and not -1 <= first <= vit.num_hidden_layers:
            raise UserError(
                f"model.tune.vision_tower_from_layer is {first}; expected -1 (all), 0..{vit.num_hidden_layers} or null"
            )


def model_shapes(config: TinyLlavaModelConfig) -> Shapes:
    """Returns name -> shape of the parameters of `TinyLlavaModel`."""
    lm, vit = config.language_model, config.vision_tower
    shapes = decoder_shapes(lm, "language_model.") if lm else {}
    if vit:
        shapes |= vit_shapes(vit, "vision_tower.")
    if lm and vit:
        shapes |= connector_shapes(config.connector, vit.hidden_size, lm.hidden_size)
    if config.image_newline:
        shapes["image_newline"] = (lm.hidden_size,)
    return shapes


def connector_shapes(config: ConnectorConfig, image_width: int, hidden_size: int) -> Shapes:
    """Returns name -> shape of the parameters of the connector; see `build_connector`."""
    name = "mm_projector"
    if config.type == "resampler":
        return resampler_shapes(
            image_width,
            width=config.resampler_hidden_size,
            out_width=hidden_size,
            num_queries=config.num_queries,
            num_layers=config.num_resampler_layers,
            prefix=f"{name}.",
        )
    if config.type == "linear":
        return linear_shapes(name, hidden_size, image_width)
    widths = [image_width, *[hidden_size] * config.num_linears]
    shapes: Shapes = {}
    for layer in range(config.num_linears):
        # activations have the odd numbers
        shapes |= linear_shapes(f"{name}.{2 * layer}", widths[layer + 1], widths[layer])
    return shapes
