"""Typed configs of decoders and vision transformers, with validation. Imports no framework.

A config fully determines a Cell; `mindvlm.nn.shapes` derives the tensors of the Cell from it.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mindvlm.core.errors import UserError

ACTIVATIONS = ("gelu", "quick_gelu", "silu", "relu", "gelu_new", "gelu_pytorch_tanh")
"""Names of the activations in `mindvlm.nn.mlp`."""

NUM_OFFSET_ROWS = 2
"""Unused rows at the start of OPT's position table (`OPTLearnedPositionalEmbedding`)."""

FEED_FORWARD_FACTOR = 4
"""Ratio of the inner to the outer width of a resampler's feed-forward block."""

MAX_SIZE = 2**31 - 1


@dataclass(kw_only=True)
class RopeScaling:
    """Llama-3's scaling of the rotary frequencies, type `llama3` of transformers.

    Wavelengths above `original_max_position_embeddings / low_freq_factor` are multiplied by `factor`; those below
    `original_max_position_embeddings / high_freq_factor` are unchanged; those in between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(kw_only=True)
class DecoderConfig:
    """Sizes and variant of a decoder; the defaults describe Qwen-1.

    Attributes:
        intermediate_size: width of one MLP branch.
        norm: kind of norm, with epsilon `rms_norm_eps` or `layer_norm_eps`.
        num_key_value_heads: key and value heads, each shared by consecutive query heads; None for one per query head.
        position: "rotary" with `rope_theta` and `rope_scaling`, or "learned" with a table of
            `max_position_embeddings` rows.
        partial_rotary_factor: fraction of a head's dimensions that are rotated, from the first one on.
        residual: "sequential": attention, then the MLP, each after its own norm; "parallel": both after one norm.
        residual_dropout: dropout probability of the parallel branches in training.
        mlp: "gated": down(act(gate x) * up x) without biases; "plain": fc2(act(fc1 x)), with biases if `mlp_bias`.
        qkv_bias, o_bias: whether the attention's input and output projections have biases.
        float32_scores: whether query-key products are always in float32.
        tie_word_embeddings: whether the head shares the matrix of token embeddings.
        head_bias: whether the head has a bias.
        training_length: sequence length of pretraining (`seq_length` in Qwen-1). Dynamic NTK and LogN apply to longer
            sequences, with rotary positions only.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int
    intermediate_size: int
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int | None = None
    residual: Literal["sequential", "parallel"] = "sequential"
    residual_dropout: float = 0.0
    mlp: Literal["gated", "plain"] = "gated"
    mlp_bias: bool = True
    hidden_act: str = "silu"
    qkv_bias: bool = True
    o_bias: bool = False
    float32_scores: bool = False
    tie_word_embeddings: bool = False
    head_bias: bool = False
    training_length: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.position == "learned":
            self.use_dynamic_ntk = self.use_logn_attn = False
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """R, the number of rotated dimensions; two share one inverse frequency."""
        return int(self.head_dim * self.partial_rotary_factor)

    def share(self, num_processes: int) -> "DecoderConfig":
        """Returns the sizes of the part that each of several tensor-parallel processes computes."""
        divided = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        return dataclasses.replace(self, **{name: getattr(self, name) // num_processes for name in divided})

    @property
    def is_grouped(self) -> bool:
        """Whether there are fewer key and value heads than query heads."""
        return self.num_key_value_heads != self.num_attention_heads


@dataclass(kw_only=True)
class VitConfig:
    """Sizes and variant of a vision transformer.

    Attributes:
        dialect: "clip": class token, patch projection without bias, norm before the layers; "siglip": patch projection
            with bias, neither class token nor norm.
        image_size: in pixels, one number for a square or [height, width]; pixels outside whole patches are dropped.
    """

    dialect: Literal["clip", "siglip"] = "clip"

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int | list[int] = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        rows, columns = grid_size(self.image_size, self.patch_size)
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """T, the number of patches plus CLIP's class token."""
        return self.num_patches + (self.dialect == "clip")


def height_and_width(size: int | list[int]) -> tuple[int, int]:
    """Returns (height, width) of an image size: one number for a square, or a [height, width] pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def grid_size(image_size: int | list[int], patch_size: int) -> tuple[int, int]:
    """Returns the rows and columns of patches; a strided convolution drops the pixels beyond the last whole patch."""
    height, width = height_and_width(image_size)
    return height // patch_size, width // patch_size


def check_vision_tower(vit: VitConfig, select_layer: int) -> None:
    """Validates a tower. Raises UserError if it cannot be built or has no layer `select_layer`."""
    check_positive("vision_tower", vit)
    check_divides("vision_tower", vit.hidden_size, vit.num_attention_heads)
    check_image_size("vision_tower", vit.image_size, vit.patch_size)
    check_activation("vision_tower", vit.hidden_act)
    if not -vit.num_hidden_layers - 1 <= select_layer <= vit.num_hidden_layers:
        raise UserError(
            f"model.vision_select_layer is {select_layer}; the tower has "
            f"{vit.num_hidden_layers} layers, so expected -{vit.num_hidden_layers + 1}..{vit.num_hidden_layers}"
        )


def check_language_model(lm: DecoderConfig, *, max_length: int) -> None:
    """Validates a decoder. Raises UserError if it cannot be built or does not support `max_length` tokens."""
    check_positive("language_model", lm, may_be_zero=("residual_dropout",))
    check_activation("language_model", lm.hidden_act)
    if lm.num_attention_heads % lm.num_key_value_heads:
        raise UserError(
            f"model.language_model.num_attention_heads is {lm.num_attention_heads} but num_key_value_heads is "
            f"{lm.num_key_value_heads}; the first must be a multiple of the second"
        )
    if lm.hidden_size % 2:
        raise UserError(f"model.language_model.hidden_size is {lm.hidden_size}; expected an even number")
    # int() of a very large product would overflow
    is_beyond = lm.partial_rotary_factor >= 2 or not 0 < lm.rotary_dim <= lm.head_dim
    if lm.position == "rotary" and (is_beyond or lm.rotary_dim % 2):
        raise UserError(
            f"model.language_model.head_dim is {lm.head_dim} and partial_rotary_factor {lm.partial_rotary_factor}; "
            "rotary positions need an even number of the head's dimensions"
        )
    if not 0 <= lm.residual_dropout < 1:
        raise UserError(f"model.language_model.residual_dropout is {lm.residual_dropout}; expected 0 to below 1")
    if lm.use_logn_attn and max_length > 32767:
        raise UserError(f"model.max_length is {max_length}; LogN attention is defined up to 32767 tokens")
    if lm.rope_scaling:
        check_rope_scaling(lm.rope_scaling)
    if lm.position == "learned":
        if lm.max_position_embeddings is None or lm.max_position_embeddings < 1:
            raise UserError(
                f"model.language_model.max_position_embeddings is {lm.max_position_embeddings}; learned positions need "
                "the number of their rows"
            )
        if max_length > lm.max_position_embeddings:
            raise UserError(
                f"model.max_length is {max_length} but model.language_model.max_position_embeddings is "
                f"{lm.max_position_embeddings}; the context cannot be longer than the table of positions"
            )


def check_rope_scaling(scaling: RopeScaling) -> None:
    """Raises UserError if a value is not positive or the bounds of the wavelengths are in the wrong order."""
    check_positive("language_model.rope_scaling", scaling)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"model.language_model.rope_scaling.low_freq_factor is {scaling.low_freq_factor} but high_freq_factor is "
            f"{scaling.high_freq_factor}; the first must be smaller"
        )


def check_activation(section: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise UserError(f"model.{section}.hidden_act is {name!r}; expected one of {', '.join(ACTIVATIONS)}")


def check_positive(section: str, config, *, may_be_zero: Collection[str] = ()) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in may_be_zero:
            continue
        if f.type in (int, "int", int | None) and value is not None and not 1 <= value <= MAX_SIZE:
            raise UserError(f"model.{section}.{f.name} is {value}; expected at least 1, at most {MAX_SIZE}")
        if f.type in (float, "float") and not 0 < value < math.inf:
            raise UserError(f"model.{section}.{f.name} is {value}; expected a finite number above 0")


def check_image_size(section: str, image_size: int | list[int], patch_size: int) -> None:
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    if len(sides) != 2 or min(sides) < patch_size:
        raise UserError(
            f"model.{section}.image_size is {image_size}; expected one number or [height, width], each at least the "
            f"patch_size of {patch_size}"
        )


def check_divides(section: str, width: int, num_heads: int) -> None:
    if width % num_heads:
        raise UserError(f"model.{section}: width {width} is not a multiple of {num_heads} attention heads")


def check_token_counts(model, processor) -> None:
    """Raises UserError if a model and its processor disagree on the tokens of an image or on the vocabulary."""
    if processor.num_image_tokens != model.image_token_len:
        raise UserError(
            f"processor.num_image_tokens is {processor.num_image_tokens} but model.image_token_len is "
            f"{model.image_token_len}; the two must be equal"
        )
    if model.language_model and processor.vocab_size != model.language_model.vocab_size:
        raise UserError(
            f"processor.vocab_size is {processor.vocab_size} but model.language_model.vocab_size is "
            f"{model.language_model.vocab_size}; the two must be equal"
        )
