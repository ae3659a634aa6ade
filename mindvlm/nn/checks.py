"""Impossible or contradicting sizes of decoders and towers as errors that name the key."""

import dataclasses
import math

from mindvlm.core.errors import UserError
from mindvlm.nn.activation import ACTIVATIONS
from mindvlm.nn.decoder import DecoderConfig
from mindvlm.nn.vit import VitConfig

MAX_SIZE = 2**31 - 1
MAY_BE_ZERO = ("window_size", "residual_dropout")


def check_vision_tower(vit: VitConfig, select_layer: int) -> None:
    """Raises UserError where the CLIP tower cannot be built, or has no layer `select_layer`."""
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
    """Raises UserError where the decoder cannot be built, or cannot reach `max_length` tokens."""
    check_positive("language_model", lm)
    check_activation("language_model", lm.hidden_act)
    if lm.num_attention_heads % lm.num_key_value_heads:
        raise UserError(
            f"model.language_model.num_attention_heads is {lm.num_attention_heads} but num_key_value_heads is "
            f"{lm.num_key_value_heads}; the first must be a multiple of the second"
        )
    if lm.hidden_size % 2:
        raise UserError(f"model.language_model.hidden_size is {lm.hidden_size}; expected an even number")
    # a factor of 2 is beyond the head anyway, and a very large one has no whole product
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


def check_activation(section: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise UserError(f"model.{section}.hidden_act is {name!r}; expected one of {', '.join(ACTIVATIONS)}")


def check_positive(section: str, config) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in MAY_BE_ZERO:
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
    """Raises UserError where a model and its processor count an image's tokens or the vocabulary differently."""
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
