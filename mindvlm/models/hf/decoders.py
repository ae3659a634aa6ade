"""Reads the config.json of a language model (Llama, Phi, StableLM, Qwen2) and writes it back."""

from collections.abc import Callable, Mapping
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.nn.config import DecoderConfig, RopeScaling
from mindvlm.weights.config_json import (
    ABOVE_ZERO,
    FLAG,
    NUM_LAYERS,
    SHARE,
    SIZE,
    TEXT,
    TEXTS,
    ConfigTable,
    Kind,
    shown,
)

MODEL_TYPES = {
    "phi": "phi",
    "stablelm_epoch": "stablelm",
    "stablelm": "stablelm",
    "llama": "llama",
    "qwen2": "qwen2",
}
"""`model_type` of a config.json -> dialect of the decoder. Vicuna and Llama 3 have the type "llama"."""


def dialect_of(table: ConfigTable, model_types: Mapping[str, str] = MODEL_TYPES) -> str:
    """Returns the decoder dialect of a config.json, from `model_type` or else from `architectures`.

    Args:
        table: the contents of the file.
        model_types: the supported values of `model_type` -> dialect.

    Raises:
        UserError: neither key names a supported language model.
    """
    names = [table.get("model_type", TEXT, ""), *table.get("architectures", TEXTS, ())]
    for name in names:
        if name in model_types:
            return model_types[name]
        for dialect in model_types.values():
            if dialect in name.lower():
                return dialect
    raise UserError(
        f"{table.path}: {table.prefix}model_type is {shown(table.values.get('model_type'))}, which is not a "
        f"supported language model; expected one of {', '.join(model_types)}"
    )


def read_decoder(table: ConfigTable, dialect: str, **changes: Any) -> DecoderConfig:
    """Returns the decoder config of a language model's config.json.

    Args:
        table: the contents of the file.
        dialect: a key of `READERS`.
        changes: fields that replace those of the file.

    Raises:
        UserError: a key is missing, has a wrong value, or requests an unsupported feature.
    """
    hidden_size, num_heads = table.require("hidden_size", SIZE), table.require("num_attention_heads", SIZE)
    head_dim = hidden_size // num_heads
    table.refuse_setting("head_dim", head_dim)
    common = {
        "vocab_size": table.require("vocab_size", SIZE),
        "hidden_size": hidden_size,
        "num_hidden_layers": table.require("num_hidden_layers", NUM_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": table.get("num_key_value_heads", SIZE),
        "head_dim": head_dim,
        "intermediate_size": table.require("intermediate_size", SIZE),
        "rope_theta": rotary_value(table, ABOVE_ZERO, "rope_theta", default=10000.0),
        "rope_scaling": read_rope_scaling(table),
        "initializer_range": table.setting("initializer_range", ABOVE_ZERO, 0.02),
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }
    return DecoderConfig(**{**common, **READERS[dialect](table), **changes})


def rotary_value(table: ConfigTable, kind: Kind, *keys: str, default: float) -> float:
    """Returns the first of `keys` that is set. transformers 5 moved these keys into `rope_parameters`."""
    if table.only_sizes:
        return default
    for place in (table.table("rope_parameters"), table):
        for key in keys:
            if place is not None and key in place:
                return place.get(key, kind)
    return default


def read_rope_scaling(table: ConfigTable) -> RopeScaling | None:
    """Returns Llama 3's scaling of the rotary frequencies from `rope_parameters` or `rope_scaling`, or None.

    Raises:
        UserError: the scaling has another type, or `rope_scaling` has no type.
    """
    if table.only_sizes:
        return None
    for name in ("rope_parameters", "rope_scaling"):
        rope = table.table(name)
        if rope is None:
            continue
        key = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
        if name == "rope_scaling":
            rope.require(key, TEXT)
        rope.refuse(key, "default", "llama3")
        if rope.values.get(key) == "llama3":
            return RopeScaling(
                **{key: rope.require(key, ABOVE_ZERO) for key in ("factor", "low_freq_factor", "high_freq_factor")},
                original_max_position_embeddings=rope.require("original_max_position_embeddings", SIZE),
            )
    return None


def phi_keys(table: ConfigTable) -> dict[str, Any]:
    """Reads the keys of Phi-2."""
    table.refuse_setting("tie_word_embeddings", False)
    table.refuse_setting("qk_layernorm", False)
    table.refuse_setting("embd_pdrop", 0)
    table.refuse_setting("attention_dropout", 0)
    return {
        "norm": "layer_norm",
        "layer_norm_eps": table.setting("layer_norm_eps", ABOVE_ZERO, 1e-5),
        "partial_rotary_factor": rotary_value(table, SHARE, "partial_rotary_factor", default=0.5),
        "residual": "parallel",
        "residual_dropout": float(table.setting("resid_pdrop", SHARE, 0.0)),
        "mlp": "plain",
        "hidden_act": table.setting("hidden_act", TEXT, "gelu_new"),
        "qkv_bias": True,
        "o_bias": True,
        "float32_scores": True,
    }


def stablelm_keys(table: ConfigTable) -> dict[str, Any]:
    """Reads the keys of StableLM-2. The original code and transformers spell three keys differently."""
    table.refuse_setting("tie_word_embeddings", False)
    table.refuse_setting("use_parallel_residual", False)
    table.refuse_setting("qk_layernorm", False)
    eps = table.setting("layer_norm_eps", ABOVE_ZERO, 1e-5)
    return {
        "norm": "layer_norm",
        "layer_norm_eps": table.setting("norm_eps", ABOVE_ZERO, eps),
        "partial_rotary_factor": rotary_value(table, SHARE, "rope_pct", "partial_rotary_factor", default=0.25),
        "hidden_act": table.setting("hidden_act", TEXT, "silu"),
        "qkv_bias": table.get("use_qkv_bias", FLAG, False),
    }


def llama_keys(table: ConfigTable) -> dict[str, Any]:
    """Reads the keys of Llama, TinyLlama, Vicuna and Llama 3."""
    table.refuse_setting("attention_bias", False)
    table.refuse_setting("mlp_bias", False)
    return {
        "rms_norm_eps": table.setting("rms_norm_eps", ABOVE_ZERO, 1e-6),
        "hidden_act": table.setting("hidden_act", TEXT, "silu"),
        "qkv_bias": False,
        "tie_word_embeddings": table.get("tie_word_embeddings", FLAG, False),
    }


def qwen2_keys(table: ConfigTable) -> dict[str, Any]:
    """Reads the keys of Qwen2 and Qwen2.5."""
    table.refuse_setting("use_sliding_window", False)
    return {
        "rms_norm_eps": table.setting("rms_norm_eps", ABOVE_ZERO, 1e-6),
        "hidden_act": table.setting("hidden_act", TEXT, "silu"),
        "qkv_bias": True,
        "tie_word_embeddings": table.get("tie_word_embeddings", FLAG, False),
    }


READERS: dict[str, Callable[[ConfigTable], dict[str, Any]]] = {
    "phi": phi_keys,
    "stablelm": stablelm_keys,
    "llama": llama_keys,
    "qwen2": qwen2_keys,
}


def dialect_of_decoder(decoder: DecoderConfig) -> str:
    """Returns the dialect of a decoder config."""
    if decoder.residual == "parallel":
        return "phi"
    if decoder.norm == "layer_norm":
        return "stablelm"
    return "qwen2" if decoder.qkv_bias else "llama"


def decoder_keys(decoder: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json keys of a decoder; the reverse of `read_decoder`."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "hidden_act", "rope_theta", "initializer_range", "tie_word_embeddings")
    own = {
        "phi": {
            "layer_norm_eps": decoder.layer_norm_eps,
            "partial_rotary_factor": decoder.partial_rotary_factor,
            "resid_pdrop": decoder.residual_dropout,
        },
        "stablelm": {
            "norm_eps": decoder.layer_norm_eps,
            "rope_pct": decoder.partial_rotary_factor,
            "use_qkv_bias": decoder.qkv_bias,
        },
        "llama": {"rms_norm_eps": decoder.rms_norm_eps},
        "qwen2": {"rms_norm_eps": decoder.rms_norm_eps},
    }
    scaling = {"rope_scaling": {"rope_type": "llama3", **vars(decoder.rope_scaling)}} if decoder.rope_scaling else {}
    return {**{key: getattr(decoder, key) for key in same}, **own[dialect_of_decoder(decoder)], **scaling}
