"""The keys of a config.json that act, and what their values may be."""

import math
from collections.abc import Mapping
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.weights.config_json import FLAG, IMAGE_SIZE, MAX_NUM_LAYERS, SIZE, Kind, check_kinds

TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
TABLE = Kind("a table", lambda value: isinstance(value, Mapping))
WHOLE = Kind("a whole number", lambda value: type(value) is int)
ABOVE_ZERO = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
LAYERS = Kind(
    f"a whole number from 1 to {MAX_NUM_LAYERS}", lambda value: type(value) is int and 1 <= value <= MAX_NUM_LAYERS
)

ANY_MODEL = {"model_type": TEXT, "architectures": TEXTS}
SHARED = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), SIZE),
    "num_hidden_layers": LAYERS,
    "hidden_act": TEXT,
    "layer_norm_eps": ABOVE_ZERO,
}
DECODER = {
    **ANY_MODEL,
    **SHARED,
    **dict.fromkeys(("vocab_size", "num_key_value_heads", "max_position_embeddings", "head_dim"), SIZE),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "norm_eps", "initializer_range"), ABOVE_ZERO),
    **dict.fromkeys(("partial_rotary_factor", "rope_pct", "resid_pdrop"), SHARE),
    "use_qkv_bias": FLAG,
    "pad_token_id": WHOLE,
    "rope_parameters": TABLE,
}
TOWER = {**ANY_MODEL, **SHARED, "image_size": IMAGE_SIZE, "patch_size": SIZE}
WHOLE_MODEL = {
    **DECODER,
    "text_config": TABLE,
    "vision_config": TABLE,
    **dict.fromkeys(("mm_vision_tower", "mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type"), TEXT),
    **dict.fromkeys(("connector_type", "vision_feature_select_strategy", "projector_hidden_act"), TEXT),
    **dict.fromkeys(("image_aspect_ratio", "conversation_template", "conversation_system"), TEXT),
    **dict.fromkeys(("mm_vision_select_layer", "vision_feature_layer"), WHOLE),
    **dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token"), FLAG),
    **dict.fromkeys(
        ("resampler_hidden_size", "num_queries", "num_resampler_layers", "tokenizer_model_max_length"), SIZE
    ),
}


def checked(data: Mapping[str, Any], name: str = "config.json") -> dict[str, Any]:
    """A config.json without the keys that are null, which are as good as absent, its tables included.

    Args:
        name: what to call it in messages.

    Raises:
        UserError: the value of a key that acts is of another kind.
    """
    config = without_nulls(data)
    is_tower = str(config.get("model_type", "")).startswith(("siglip", "clip"))
    tables = {"": (config, TOWER if is_tower else WHOLE_MODEL)}
    if not is_tower:
        tables["text_config."] = (config.get("text_config"), DECODER)
    tables["vision_config."] = (config.get("vision_config"), TOWER)
    try:
        for prefix, (table, kinds) in tables.items():
            if isinstance(table, Mapping):
                check_kinds(table, kinds, prefix=prefix)
                check_kinds(table.get("rope_parameters", {}), DECODER, prefix=f"{prefix}rope_parameters.")
    except ValueError as error:
        raise UserError(f"{name}: {error}; correct it, or take the file of the published model") from None
    return config


def require_table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table of a checked config. Raises UserError if it is not there."""
    if key not in config:
        raise UserError(f"config.json lacks {key!r}, which describes a part of the model; take the published file")
    return config[key]


def without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in data.items() if value is not None}
    return {key: without_nulls(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
