"""Decoder configs from the config.json of a language model: Phi-2, StableLM-2 or Llama, inside TinyLLaVA or alone."""

from collections.abc import Mapping
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.nn.decoder import DecoderConfig

Config = Mapping[str, Any]

# config.json's `model_type` -> dialect of the decoder
DIALECTS = {
    "tiny_llava_phi": "phi",
    "phi": "phi",
    "tiny_llava_stablelm": "stablelm",
    "stablelm_epoch": "stablelm",
    "stablelm": "stablelm",
    "tiny_llava": "llama",
    "tinyllava": "llama",
    "llama": "llama",
}


def dialect_of(data: Config) -> str:
    """ "phi", "stablelm" or "llama", by `model_type` or else by the name of the architecture.

    Raises:
        UserError: neither names a language model that is known.
    """
    names = [str(data.get("model_type", "")), *map(str, data.get("architectures") or ())]
    for name in names:
        if name in DIALECTS:
            return DIALECTS[name]
        for dialect in ("phi", "stablelm", "llama"):
            if dialect in name.lower().replace("tinyllava", "").replace("tiny_llava", ""):
                return dialect
    raise UserError(
        f"config.json: model_type is {data.get('model_type')!r}, which is no language model of this family; expected "
        f"one of {', '.join(DIALECTS)}, or llava"
    )


def decoder_config(data: Config, dialect: str, **changes: Any) -> DecoderConfig:
    """The decoder that a language model's config.json describes.

    Raises:
        UserError: a key is missing, or asks for something that the decoder does not have.
    """
    data = with_rope_keys(data)
    try:
        return DecoderConfig(**{**common_keys(data), **DIALECT_KEYS[dialect](data), **changes})
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]!r}, which describes the {dialect} decoder") from None


def with_rope_keys(data: Config) -> Config:
    """The config with the keys of the rotation where they stood before transformers 5 put them into `rope_parameters`.

    Raises:
        UserError: the positions are scaled.
    """
    rope = data.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return data
    refuse(rope, "rope_type", (None, "default"))
    return {**data, **rope}


def common_keys(data: Config) -> dict[str, Any]:
    refuse(data, "rope_scaling", (None,))
    refuse(data, "tie_word_embeddings", (None, False))
    head_dim = data["hidden_size"] // data["num_attention_heads"]
    refuse(data, "head_dim", (None, head_dim))
    return {
        "vocab_size": data["vocab_size"],
        "hidden_size": data["hidden_size"],
        "num_hidden_layers": data["num_hidden_layers"],
        "num_attention_heads": data["num_attention_heads"],
        "num_key_value_heads": data.get("num_key_value_heads"),
        "head_dim": head_dim,
        "intermediate_size": data["intermediate_size"],
        "rope_theta": data.get("rope_theta", 10000.0),
        "initializer_range": data.get("initializer_range", 0.02),
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }


def phi_keys(data: Config) -> dict[str, Any]:
    refuse(data, "qk_layernorm", (None, False))
    refuse(data, "embd_pdrop", (None, 0))
    refuse(data, "attention_dropout", (None, 0))
    return {
        "norm": "layer_norm",
        "layer_norm_eps": data.get("layer_norm_eps", 1e-5),
        "partial_rotary_factor": data.get("partial_rotary_factor", 0.5),
        "residual": "parallel",
        "residual_dropout": float(data.get("resid_pdrop", 0.0)),
        "mlp": "plain",
        "hidden_act": data.get("hidden_act", "gelu_new"),
        "qkv_bias": True,
        "o_bias": True,
        "float32_scores": True,
    }


def stablelm_keys(data: Config) -> dict[str, Any]:
    refuse(data, "use_parallel_residual", (None, False))
    refuse(data, "qk_layernorm", (None, False))
    return {
        "norm": "layer_norm",
        "layer_norm_eps": data.get("norm_eps", data.get("layer_norm_eps", 1e-5)),
        "partial_rotary_factor": data.get("rope_pct", data.get("partial_rotary_factor", 0.25)),
        "hidden_act": data.get("hidden_act", "silu"),
        "qkv_bias": data.get("use_qkv_bias", False),
    }


def llama_keys(data: Config) -> dict[str, Any]:
    refuse(data, "attention_bias", (None, False))
    refuse(data, "mlp_bias", (None, False))
    return {
        "rms_norm_eps": data.get("rms_norm_eps", 1e-6),
        "hidden_act": data.get("hidden_act", "silu"),
        "qkv_bias": False,
    }


DIALECT_KEYS = {"phi": phi_keys, "stablelm": stablelm_keys, "llama": llama_keys}


def refuse(data: Config, key: str, known: tuple) -> None:
    if data.get(key) not in known:
        raise UserError(f"config.json: {key} is {data[key]!r}; only {known[-1]!r} is supported")
