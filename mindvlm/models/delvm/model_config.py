"""The typed config of a DeLVM, its checks, and the shapes of its parameters. Needs no framework."""

from dataclasses import InitVar, dataclass, field
from typing import Literal

from mindvlm.core.errors import UserError
from mindvlm.nn.config import DecoderConfig, check_language_model
from mindvlm.nn.shapes import Shapes, decoder_shapes, linear_shapes, norm_shapes

MAX_BLOCKS = 100
"""Limit of the levels of a VQGAN, and of the blocks of a level."""

InputEmbedding = Literal["table", "codebook"]


@dataclass(kw_only=True)
class VqganConfig:
    """Sizes of the VQGAN, with the keys of openMUSE; the defaults describe vqgan-f16-8192-laion.

    Attributes:
        resolution: edge of a picture in pixels.
        channel_mult: width of each level, as a multiple of `hidden_channels`.
        attn_resolutions: resolutions whose levels have attention. A level with one block does not use it.
        commitment_cost: weight of the second term of the codebook loss, in training.
        num_groups: groups of every norm, 32 in the original. A group of one channel hides the mean of the channel.
    """

    resolution: int = 256
    num_channels: Literal[3] = 3
    hidden_channels: int = 128
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 2, 4, 6])
    num_res_blocks: int = 2
    attn_resolutions: list[int] = field(default_factory=list)
    no_attn_mid_block: bool = True
    z_channels: int = 64
    num_embeddings: int = 8192
    quantized_embed_dim: int = 64
    resample_with_conv: bool = True
    commitment_cost: float = 0.25
    num_groups: int = 32

    def __post_init__(self) -> None:
        for key in ("resolution", "hidden_channels", "num_res_blocks", "z_channels", "num_embeddings", "num_groups"):
            if getattr(self, key) < 1:
                raise UserError(f"model.vqgan.{key} is {getattr(self, key)}; expected at least 1")
        if not self.channel_mult or min(self.channel_mult) < 1 or self.quantized_embed_dim < 1:
            raise UserError(
                f"model.vqgan: channel_mult is {self.channel_mult} and quantized_embed_dim {self.quantized_embed_dim}; "
                "expected numbers of at least 1"
            )
        if max(self.num_res_blocks, self.num_levels) > MAX_BLOCKS:
            raise UserError(
                f"model.vqgan: num_res_blocks is {self.num_res_blocks} and channel_mult has {self.num_levels} levels; "
                f"expected at most {MAX_BLOCKS}"
            )
        if self.hidden_channels % self.num_groups:
            raise UserError(
                f"model.vqgan.hidden_channels is {self.hidden_channels}; expected a multiple of num_groups, "
                f"{self.num_groups}"
            )
        if self.resolution % 2 ** (self.num_levels - 1):
            raise UserError(
                f"model.vqgan.resolution is {self.resolution}; expected a multiple of {2 ** (self.num_levels - 1)}, "
                f"which its {self.num_levels} levels divide it by"
            )

    @property
    def num_levels(self) -> int:
        return len(self.channel_mult)

    @property
    def widths(self) -> list[int]:
        """Number of channels of each level."""
        return [self.hidden_channels * multiple for multiple in self.channel_mult]

    @property
    def num_codes(self) -> int:
        """Number of codes of a picture."""
        return (self.resolution // 2 ** (self.num_levels - 1)) ** 2


@dataclass(kw_only=True)
class DelvmModelConfig:
    """The parts of a DeLVM; a part that is None is absent.

    Attributes:
        input_embedding: "table": a row for each code (Hugging Face form); "codebook": the row of the VQGAN's codebook
            through a projection (training form).
        max_length: limit of all pictures in codes, those that are generated included.
        validate: whether to check that the model can run; if False, the config only describes tensor sizes.
    """

    language_model: DecoderConfig | None = None
    vqgan: VqganConfig | None = None
    input_embedding: InputEmbedding = "table"
    max_length: int = 2048
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        lm, vqgan = self.language_model, self.vqgan
        if validate and lm:
            check_language_model(lm, max_length=self.max_length)
            if self.max_length < 1:
                raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if validate and lm and vqgan and lm.vocab_size != vqgan.num_embeddings:
            raise UserError(
                f"model.language_model.vocab_size is {lm.vocab_size} but model.vqgan.num_embeddings is "
                f"{vqgan.num_embeddings}; the two must be equal"
            )
        if lm and not vqgan and self.input_embedding == "codebook":
            raise UserError("model.input_embedding is 'codebook' but model.vqgan is missing; add it, or set 'table'")

    @property
    def image_token_len(self) -> int:
        """Number of feature rows of a picture: it becomes codes, which need none."""
        return 0

    @property
    def num_picture_codes(self) -> int:
        """Number of codes of a picture."""
        return self.vqgan.num_codes


def model_shapes(config: DelvmModelConfig) -> Shapes:
    """Returns name -> shape of the parameters of `DelvmModel`."""
    shapes: Shapes = vqgan_shapes(config.vqgan) if config.vqgan else {}
    if config.language_model:
        shapes |= decoder_shapes(config.language_model, "language_model.")
        if config.input_embedding == "codebook":
            del shapes["language_model.embed_tokens.weight"]
            width = config.language_model.hidden_size
            name = "language_model.embed_tokens.projection"
            shapes |= linear_shapes(name, width, config.vqgan.quantized_embed_dim, bias=False)
    return shapes


def vqgan_shapes(config: VqganConfig, prefix: str = "vqgan.") -> Shapes:
    """Returns name -> shape of the parameters of `Vqgan`."""
    widths, last = config.widths, config.num_levels - 1
    shapes: Shapes = {f"{prefix}quantize.embedding.weight": (config.num_embeddings, config.quantized_embed_dim)}
    shapes |= conv_shapes(f"{prefix}quant_conv", config.z_channels, config.quantized_embed_dim, 1)
    shapes |= conv_shapes(f"{prefix}post_quant_conv", config.quantized_embed_dim, config.z_channels, 1)
    shapes |= half_shapes(config, f"{prefix}encoder.", config.num_channels, config.hidden_channels, widths[last])
    shapes |= conv_shapes(f"{prefix}encoder.conv_out", widths[last], config.z_channels)
    shapes |= half_shapes(config, f"{prefix}decoder.", config.z_channels, widths[last], widths[0])
    shapes |= conv_shapes(f"{prefix}decoder.conv_out", widths[0], config.num_channels)
    for level, width in enumerate(widths):
        below = config.hidden_channels if level == 0 else widths[level - 1]
        above = widths[min(level + 1, last)]
        for place, num_in, num_blocks in (
            (f"{prefix}encoder.down.{level}.", below, config.num_res_blocks),
            (f"{prefix}decoder.up.{level}.", above, config.num_res_blocks + 1),
        ):
            for block in range(num_blocks):
                shapes |= resnet_shapes(f"{place}block.{block}.", width if block else num_in, width)
                if config.resolution // 2**level in config.attn_resolutions:
                    shapes |= attention_shapes(f"{place}attn.{block}.", width)
        if config.resample_with_conv:
            shapes |= conv_shapes(f"{prefix}encoder.down.{level}.downsample.conv", width, width) if level < last else {}
            shapes |= conv_shapes(f"{prefix}decoder.up.{level}.upsample.conv", width, width) if level else {}
    return shapes


def half_shapes(config: VqganConfig, prefix: str, num_in: int, first: int, last: int) -> Shapes:
    """Returns the shapes of an encoder or decoder without its levels and its last convolution."""
    middle = config.widths[-1]
    shapes = conv_shapes(f"{prefix}conv_in", num_in, first) | norm_shapes(f"{prefix}norm_out", last)
    for block in ("block_1", "block_2"):
        shapes |= resnet_shapes(f"{prefix}mid.{block}.", middle, middle)
    return shapes if config.no_attn_mid_block else shapes | attention_shapes(f"{prefix}mid.attn_1.", middle)


def resnet_shapes(prefix: str, num_in: int, num_out: int) -> Shapes:
    shapes = norm_shapes(f"{prefix}norm1", num_in) | conv_shapes(f"{prefix}conv1", num_in, num_out)
    shapes |= norm_shapes(f"{prefix}norm2", num_out) | conv_shapes(f"{prefix}conv2", num_out, num_out)
    return shapes if num_in == num_out else shapes | conv_shapes(f"{prefix}nin_shortcut", num_in, num_out, 1)


def attention_shapes(prefix: str, width: int) -> Shapes:
    shapes = norm_shapes(f"{prefix}norm", width)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= conv_shapes(f"{prefix}{name}", width, width, 1)
    return shapes


def conv_shapes(name: str, num_in: int, num_out: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (num_out, num_in, size, size), f"{name}.bias": (num_out,)}
