"""The configurations of the published TinyLLaVA models and the names and shapes of their state dicts, without torch.

Reproduces the tensor inventories of bczhou/TinyLLaVA-3.1B, -2.0B and -1.5B: 877, 765 and 626 tensors, 3,186,888,224,
2,048,820,768 and 1,504,353,824 values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mindvlm.convert.reference.vary_layout import Shapes, linear_shapes, norm_shapes, whole_patches

Config = Mapping[str, Any]

SIGLIP_DEFAULTS: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
CLIP_DEFAULTS: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
RESAMPLER_DEFAULTS = {"resampler_hidden_size": 768, "num_queries": 128, "num_resampler_layers": 3}

_COMMON: dict[str, Any] = {
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}


def phi_config() -> dict[str, Any]:
    """The config.json of the published 3.1B (keys that act), with the tower written out."""
    return {
        **_COMMON,
        "architectures": ["TinyLlavaPhiForCausalLM"],
        "model_type": "tiny_llava_phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 51200,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.1,
        "max_position_embeddings": 2048,
        "tokenizer_model_max_length": 3072,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "mm_vision_tower": "bczhou/TinyLLaVA-3.1B-SigLIP",
        "vision_config": dict(SIGLIP_DEFAULTS),
    }


def stablelm_config() -> dict[str, Any]:
    """The config.json of the published 2.0B (keys that act), with the tower written out."""
    return {
        **_COMMON,
        "architectures": ["TinyLlavaStablelmForCausalLM"],
        "model_type": "tiny_llava_stablelm",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 100352,
        "hidden_act": "silu",
        "norm_eps": 1e-5,
        "rope_pct": 0.25,
        "use_qkv_bias": True,
        "max_position_embeddings": 4096,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "pad_token_id": 100257,
        "mm_vision_tower": "bczhou/TinyLLaVA-2.0B-SigLIP",
        "vision_config": dict(SIGLIP_DEFAULTS),
    }


def llama_config() -> dict[str, Any]:
    """The config.json of the published 1.5B (keys that act), with the tower written out."""
    return {
        **_COMMON,
        "architectures": ["TinyLlavaLlamaForCausalLM"],
        "model_type": "tiny_llava",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tokenizer_model_max_length": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": "bczhou/TinyLLaVA-1.5B-SigLIP",
        "vision_config": dict(SIGLIP_DEFAULTS),
    }


def legacy_config() -> dict[str, Any]:
    """The config.json of bczhou/tiny-llava-v1-hf (keys that act)."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32064,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
        },
        "vision_config": dict(CLIP_DEFAULTS),
    }


def parameter_shapes(config: Config, dialect: str) -> Shapes:
    """TinyLLaVABench's name -> shape of every tensor of a model with this config, linear weights as (out, in).

    Args:
        config: a config.json in TinyLLaVABench's form; without `vision_config` a language model alone. `head_bias`
            true adds the bias that TinyLLaVA Factory's Phi keeps.
        dialect: "phi", "stablelm" or "llama".
    """
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab_size, hidden)}
    layer_shapes = {"phi": phi_layer, "stablelm": stablelm_layer, "llama": llama_layer}[dialect]
    for layer in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(config, f"model.layers.{layer}.")
    if dialect == "phi":
        shapes |= norm_shapes("model.final_layernorm", hidden)
    elif dialect == "stablelm":
        shapes |= norm_shapes("model.norm", hidden)
    else:
        shapes["model.norm.weight"] = (hidden,)
    if "vision_config" in config:
        tower = config["vision_config"]
        shapes |= tower_shapes(tower, prefix="model.vision_tower.vision_tower.")
        shapes |= connector_shapes(config, tower_sizes(tower)["hidden_size"], prefix="model.mm_projector")
        if "unpad" in (config.get("mm_patch_merge_type") or "flat"):
            shapes["model.image_newline"] = (hidden,)
    shapes["lm_head.weight"] = (vocab_size, hidden)
    if config.get("head_bias"):
        shapes["lm_head.bias"] = (vocab_size,)
    return shapes


def phi_layer(config: Config, prefix: str) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = norm_shapes(prefix + "input_layernorm", hidden)
    for name in ("q_proj", "k_proj", "v_proj", "dense"):
        shapes |= linear_shapes(f"{prefix}self_attn.{name}", hidden, hidden)
    return shapes | linear_shapes(prefix + "mlp.fc1", inner, hidden) | linear_shapes(prefix + "mlp.fc2", hidden, inner)


def llama_layer(config: Config, prefix: str) -> Shapes:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    key_width = hidden // heads * (config.get("num_key_value_heads") or heads)
    return {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "self_attn.q_proj.weight": (hidden, hidden),
        prefix + "self_attn.k_proj.weight": (key_width, hidden),
        prefix + "self_attn.v_proj.weight": (key_width, hidden),
        prefix + "self_attn.o_proj.weight": (hidden, hidden),
        prefix + "post_attention_layernorm.weight": (hidden,),
        prefix + "mlp.gate_proj.weight": (inner, hidden),
        prefix + "mlp.up_proj.weight": (inner, hidden),
        prefix + "mlp.down_proj.weight": (hidden, inner),
    }


def stablelm_layer(config: Config, prefix: str) -> Shapes:
    shapes = llama_layer(config, prefix)
    hidden = config["hidden_size"]
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}{name}.bias"] = (hidden,)
    for name in ("q_proj", "k_proj", "v_proj"):
        if config.get("use_qkv_bias"):
            shapes[f"{prefix}self_attn.{name}.bias"] = shapes[f"{prefix}self_attn.{name}.weight"][:1]
    return shapes


def is_siglip(tower: Config) -> bool:
    return "siglip" in str(tower.get("model_type", "")).lower()


def tower_defaults(tower: Config) -> dict[str, Any]:
    return SIGLIP_DEFAULTS if is_siglip(tower) else CLIP_DEFAULTS


def tower_sizes(tower: Config) -> dict[str, Any]:
    """A tower's config.json with everything that it leaves out. SigLIP's has one layer less than the file says, unless
    `keeps_last_layer` is true."""
    sizes = {**tower_defaults(tower), **tower}
    if is_siglip(tower) and not tower.get("keeps_last_layer"):
        sizes["num_hidden_layers"] -= 1
    return sizes


def tower_shapes(tower: Config, *, prefix: str = "") -> Shapes:
    """Names and shapes of a tower from its repository's config.json, see `tower_sizes`."""
    sizes = tower_sizes(tower)
    width, inner, patch = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"]
    num_patches = math.prod(whole_patches(sizes))
    model = prefix + "vision_model."
    shapes: Shapes = {model + "embeddings.patch_embedding.weight": (width, sizes["num_channels"], patch, patch)}
    if is_siglip(tower):
        shapes[model + "embeddings.patch_embedding.bias"] = (width,)
    else:
        num_patches += 1
        shapes[model + "embeddings.class_embedding"] = (width,)
        shapes |= norm_shapes(model + "pre_layrnorm", width)
    shapes[model + "embeddings.position_embedding.weight"] = (num_patches, width)
    for layer in range(sizes["num_hidden_layers"]):
        block = f"{model}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{block}self_attn.{name}", width, width)
        shapes |= norm_shapes(block + "layer_norm1", width) | norm_shapes(block + "layer_norm2", width)
        shapes |= linear_shapes(block + "mlp.fc1", inner, width) | linear_shapes(block + "mlp.fc2", width, inner)
    return shapes | norm_shapes(model + "post_layernorm", width)


def num_connector_layers(kind: str) -> int:
    """N of mlpNx_gelu.

    Raises:
        ValueError: another type.
    """
    found = re.fullmatch(r"mlp([1-8])x_gelu", str(kind))
    if not found:
        raise ValueError(f"mm_projector_type {kind!r}: expected linear, mlpNx_gelu (N 1 to 8), resampler or identity")
    return int(found.group(1))


def connector_shapes(config: Config, width: int, *, prefix: str) -> Shapes:
    """Names and shapes of the connector that `mm_projector_type` names, behind a tower of that width.

    Raises:
        ValueError: an unknown type.
    """
    kind, hidden = config.get("mm_projector_type", "linear"), config["hidden_size"]
    if kind == "identity":
        return {}
    if kind == "linear":
        return linear_shapes(prefix, hidden, width)
    if kind == "resampler":
        return resampler_shapes({**RESAMPLER_DEFAULTS, **config}, width, hidden, prefix=prefix)
    shapes = linear_shapes(f"{prefix}.0", hidden, width)
    for layer in range(1, num_connector_layers(kind)):
        shapes |= linear_shapes(f"{prefix}.{2 * layer}", hidden, hidden)
    return shapes


def resampler_shapes(config: Config, image_width: int, hidden: int, *, prefix: str) -> Shapes:
    width = config["resampler_hidden_size"]
    shapes: Shapes = {f"{prefix}.queries": (config["num_queries"], width)}
    for layer in range(config["num_resampler_layers"]):
        block = f"{prefix}.resampler_blocks.{layer}."
        shapes |= norm_shapes(block + "norm_image", image_width) | norm_shapes(block + "norm_hidden", width)
        shapes |= {f"{block}to_{name}.weight": (width, width) for name in ("q", "out")}
        shapes |= {f"{block}to_{name}.weight": (width, image_width) for name in ("k", "v")}
        shapes |= norm_shapes(block + "feed_forward.0", width)
        shapes[block + "feed_forward.1.weight"] = (4 * width, width)
        shapes[block + "feed_forward.3.weight"] = (width, 4 * width)
    return shapes | norm_shapes(f"{prefix}.post_norm", width) | {f"{prefix}.final_proj.weight": (hidden, width)}
