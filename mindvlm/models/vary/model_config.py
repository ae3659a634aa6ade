"""The typed config of a Vary model, its checks, and the shapes of its parameters. Needs no framework."""

import math
from dataclasses import InitVar, dataclass, field

from mindvlm.core.errors import UserError
from mindvlm.nn.config import (
    DecoderConfig,
    VitConfig,
    check_divides,
    check_image_size,
    check_language_model,
    check_positive,
    check_vision_tower,
    grid_size,
)
from mindvlm.nn.shapes import Shapes, decoder_shapes, linear_shapes, norm_shapes, vit_shapes


@dataclass(kw_only=True)
class VisionVocabularyConfig:
    """The sizes of a vision vocabulary. `image_size` in pixels, one number for a square or [height, width]."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    window_size: int = 14
    image_size: int | list[int] = 1024
    patch_size: int = 16
    mlp_ratio: float = 4
    out_chans: int = 256
    net_2_channels: int = 512
    net_3_channels: int = 1024


@dataclass(kw_only=True)
class VaryModelConfig:
    """The parts of a Vary model. A part that is None is absent.

    A decoder and a vision vocabulary without a `vision_tower` (CLIP) form a Vary-tiny.

    Attributes:
        vision_select_layer: index of CLIP's features among the hidden states [embeddings, output of layer 0, ...].
        image_token_len: number of feature rows, and placeholders, per image.
        max_length: limit of prompt plus answer in tokens.
        freeze_vision_tower: whether the towers are frozen.
        validate: whether to check that the model can run; if False, the config only describes tensor sizes.
    """

    language_model: DecoderConfig | None
    vision_tower: VitConfig | None
    vision_vocabulary: VisionVocabularyConfig | None
    vision_select_layer: int = -2
    image_token_len: int = 256
    max_length: int = 2048
    freeze_vision_tower: bool = True
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool):
        if not validate:
            return
        lm, vit, sam = self.language_model, self.vision_tower, self.vision_vocabulary
        if vit:
            check_vision_tower(vit, self.vision_select_layer)
        if sam:
            check_vision_vocabulary(sam)
        if lm:
            check_language_model(lm, max_length=self.max_length)
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if lm and vit and sam:
            self.check_image_token_len(vit.num_patches, num_vocabulary_tokens(sam))
        elif self.is_tiny and self.image_token_len != num_vocabulary_tokens(sam):
            raise UserError(
                f"model.image_token_len is {self.image_token_len} but the vision vocabulary outputs "
                f"{num_vocabulary_tokens(sam)} tokens per image; set it to {num_vocabulary_tokens(sam)}"
            )

    @property
    def is_tiny(self) -> bool:
        """Whether this is a Vary-tiny."""
        return bool(self.language_model and self.vision_vocabulary and not self.vision_tower)

    def check_image_token_len(self, num_tower: int, num_vocabulary: int) -> None:
        """Raises UserError unless both towers output `image_token_len` tokens; their features share a row."""
        if num_tower != num_vocabulary:
            raise UserError(
                f"model.vision_tower outputs {num_tower} tokens per image but model.vision_vocabulary "
                f"{num_vocabulary}; change an image_size or patch_size so that they match"
            )
        if self.image_token_len != num_tower:
            raise UserError(
                f"model.image_token_len is {self.image_token_len} but both towers output {num_tower} tokens per image; "
                f"set it to {num_tower}"
            )


def num_vocabulary_tokens(sam: VisionVocabularyConfig) -> int:
    """Returns the number of tokens after the two convolutions of stride 2."""
    rows, columns = grid_size(sam.image_size, sam.patch_size)
    return math.ceil(rows / 4) * math.ceil(columns / 4)


def check_vision_vocabulary(sam: VisionVocabularyConfig) -> None:
    """Raises UserError if the vision vocabulary cannot be built."""
    check_positive("vision_vocabulary", sam, may_be_zero=("window_size",))
    check_divides("vision_vocabulary", sam.embed_dim, sam.num_heads)
    check_image_size("vision_vocabulary", sam.image_size, sam.patch_size)
    if sam.window_size < 0:
        raise UserError(f"model.vision_vocabulary.window_size is {sam.window_size}; expected 0 (none) or more")
    for index in sam.global_attn_indexes:
        if not 0 <= index < sam.depth:
            raise UserError(
                f"model.vision_vocabulary.global_attn_indexes names block {index}; "
                f"expected 0..{sam.depth - 1}, as depth is {sam.depth}"
            )


def model_shapes(config: VaryModelConfig) -> Shapes:
    """Names and shapes of the parameters of `VaryModel`."""
    lm, vit, sam = config.language_model, config.vision_tower, config.vision_vocabulary
    shapes = decoder_shapes(lm, "language_model.") if lm else {}
    if vit:
        shapes |= vit_shapes(vit, "vision_tower.")
    if sam:
        shapes |= vocabulary_shapes(sam, "vision_vocabulary.")
    if lm and vit and sam:
        half = lm.hidden_size // 2
        shapes |= linear_shapes("mm_projector", half, vit.hidden_size)
        shapes |= linear_shapes("mm_projector_vary", half, sam.net_3_channels)
    elif config.is_tiny:
        shapes |= linear_shapes("mm_projector", lm.hidden_size, sam.net_3_channels)
    return shapes


def vocabulary_shapes(config: VisionVocabularyConfig, prefix: str = "") -> Shapes:
    """Returns name -> shape of the parameters of `VisionVocabulary`."""
    width, head_dim = config.embed_dim, config.embed_dim // config.num_heads
    inner = int(width * config.mlp_ratio)
    rows, columns = grid_size(config.image_size, config.patch_size)
    shapes: Shapes = {
        f"{prefix}pos_embed": (1, rows, columns, width),
        f"{prefix}patch_embed.proj.weight": (width, 3, config.patch_size, config.patch_size),
        f"{prefix}patch_embed.proj.bias": (width,),
    }
    for layer in range(config.depth):
        block, window = f"{prefix}blocks.{layer}.", config.window_size
        is_global = layer in config.global_attn_indexes or not window
        height, breadth = (rows, columns) if is_global else (window, window)
        shapes |= norm_shapes(f"{block}norm1", width) | norm_shapes(f"{block}norm2", width)
        shapes |= linear_shapes(f"{block}attn.qkv", 3 * width, width) | linear_shapes(f"{block}attn.proj", width, width)
        shapes[f"{block}attn.rel_pos_h"] = (2 * height - 1, head_dim)
        shapes[f"{block}attn.rel_pos_w"] = (2 * breadth - 1, head_dim)
        shapes |= linear_shapes(f"{block}mlp.lin1", inner, width) | linear_shapes(f"{block}mlp.lin2", width, inner)
    neck = config.out_chans
    return shapes | {
        f"{prefix}neck.0.weight": (neck, width, 1, 1),
        **norm_shapes(f"{prefix}neck.1", neck),
        f"{prefix}neck.2.weight": (neck, neck, 3, 3),
        **norm_shapes(f"{prefix}neck.3", neck),
        f"{prefix}net_2.weight": (config.net_2_channels, neck, 3, 3),
        f"{prefix}net_3.weight": (config.net_3_channels, config.net_2_channels, 3, 3),
    }
