"""The official Vary-toy configuration and the names and shapes of its state dict, without torch.

Reproduces the tensor inventory of `HaoranWei/Vary-toy` (pytorch_model.bin): 769 tensors, 2,237,365,504 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}
VOCABULARY_DEFAULTS: dict[str, Any] = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "global_attn_indexes": [2, 5, 8, 11],
    "window_size": 14,
    "image_size": 1024,
    "patch_size": 16,
    "mlp_ratio": 4,
    "out_chans": 256,
    "net_2_channels": 512,
    "net_3_channels": 1024,
}


def vary_toy_config() -> dict[str, Any]:
    """The released config.json of Vary-toy (keys that act), with both towers written out."""
    return {
        "model_type": "mmgpt",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "kv_channels": 128,
        "vocab_size": 151860,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 8192,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "vision_select_layer": -2,
        "image_token_len": 256,
        "im_patch_token": 151859,
        "im_start_token": 151857,
        "im_end_token": 151858,
        "vision_config": dict(CLIP_DEFAULTS),
        "vision_high_config": dict(VOCABULARY_DEFAULTS),
    }


def has_vision(config: Mapping[str, Any]) -> bool:
    """Whether a config describes towers: it gives their sizes, or an image placeholder (then the released sizes)."""
    return "vision_config" in config or "im_patch_token" in config


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the CLIP tower, the released ones where `vision_config` is silent."""
    return {**CLIP_DEFAULTS, **config.get("vision_config", {})}


def vocabulary_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the vision vocabulary network, the released ones where `vision_high_config` is silent."""
    return {**VOCABULARY_DEFAULTS, **config.get("vision_high_config", {})}


def patch_grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of patches; `image_size` is one number or a pair [height, width].

    Raises:
        ValueError: a side is no multiple of `patch_size`.
    """
    size, patch = config["image_size"], config["patch_size"]
    if any(side % patch for side in (size if isinstance(size, list | tuple) else (size,))):
        raise ValueError(f"image_size {size}: both sides must be multiples of patch_size {patch}")
    return whole_patches(config)


def whole_patches(config: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of patches as `patch_grid` has them, a rest that fills no patch left out."""
    size, patch = config["image_size"], config["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch, width // patch


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Official name -> shape of every tensor of a Vary-toy with this config, linear weights as (out, in)."""
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"transformer.wte.weight": (vocab_size, hidden)}
    projection = config["num_attention_heads"] * config["kv_channels"]
    branch = config["intermediate_size"] // 2
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        shapes[prefix + "ln_1.weight"] = (hidden,)
        shapes |= linear_shapes(prefix + "attn.c_attn", 3 * projection, hidden)
        shapes[prefix + "attn.c_proj.weight"] = (hidden, projection)
        shapes[prefix + "ln_2.weight"] = (hidden,)
        shapes[prefix + "mlp.w1.weight"] = (branch, hidden)
        shapes[prefix + "mlp.w2.weight"] = (branch, hidden)
        shapes[prefix + "mlp.c_proj.weight"] = (hidden, branch)
    shapes["transformer.ln_f.weight"] = (hidden,)
    if has_vision(config):
        clip, vocabulary = clip_config(config), vocabulary_config(config)
        shapes |= clip_shapes(clip, prefix="transformer.vision_tower.")
        shapes |= vocabulary_shapes(vocabulary, prefix="transformer.vision_tower_high.")
        shapes |= linear_shapes("transformer.mm_projector", hidden // 2, clip["hidden_size"])
        shapes |= linear_shapes("transformer.mm_projector_vary", hidden // 2, vocabulary["net_3_channels"])
    shapes["lm_head.weight"] = (vocab_size, hidden)
    return shapes


def clip_shapes(config: Mapping[str, Any], *, prefix: str = "") -> Shapes:
    """Names and shapes of the CLIP tower, from its own (completed) config."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    rows, columns = patch_grid(config)
    model = prefix + "vision_model."
    shapes: Shapes = {
        model + "embeddings.class_embedding": (width,),
        model + "embeddings.patch_embedding.weight": (width, config["num_channels"], patch, patch),
        model + "embeddings.position_embedding.weight": (rows * columns + 1, width),
        **norm_shapes(model + "pre_layrnorm", width),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"{model}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{block}self_attn.{name}", width, width)
        shapes |= norm_shapes(block + "layer_norm1", width) | norm_shapes(block + "layer_norm2", width)
        shapes |= linear_shapes(block + "mlp.fc1", inner, width) | linear_shapes(block + "mlp.fc2", width, inner)
    return shapes | norm_shapes(model + "post_layernorm", width)


def vocabulary_shapes(config: Mapping[str, Any], *, prefix: str = "") -> Shapes:
    """Names and shapes of the vision vocabulary network, from its own (completed) config."""
    width, patch, window = config["embed_dim"], config["patch_size"], config["window_size"]
    inner, head_dim = int(width * config["mlp_ratio"]), width // config["num_heads"]
    out, middle, last = config["out_chans"], config["net_2_channels"], config["net_3_channels"]
    rows, columns = patch_grid(config)
    shapes: Shapes = {
        prefix + "pos_embed": (1, rows, columns, width),
        prefix + "patch_embed.proj.weight": (width, 3, patch, patch),
        prefix + "patch_embed.proj.bias": (width,),
    }
    for layer in range(config["depth"]):
        block = f"{prefix}blocks.{layer}."
        is_global = layer in config["global_attn_indexes"]
        height, breadth = (rows, columns) if is_global else (window, window)
        shapes |= norm_shapes(block + "norm1", width)
        shapes |= linear_shapes(block + "attn.qkv", 3 * width, width) | linear_shapes(block + "attn.proj", width, width)
        shapes[block + "attn.rel_pos_h"] = (2 * height - 1, head_dim)
        shapes[block + "attn.rel_pos_w"] = (2 * breadth - 1, head_dim)
        shapes |= norm_shapes(block + "norm2", width)
        shapes |= linear_shapes(block + "mlp.lin1", inner, width) | linear_shapes(block + "mlp.lin2", width, inner)
    shapes[prefix + "neck.0.weight"] = (out, width, 1, 1)
    shapes |= norm_shapes(prefix + "neck.1", out)
    shapes[prefix + "neck.2.weight"] = (out, out, 3, 3)
    shapes |= norm_shapes(prefix + "neck.3", out)
    shapes[prefix + "net_2.weight"] = (middle, out, 3, 3)
    shapes[prefix + "net_3.weight"] = (last, middle, 3, 3)
    return shapes


def linear_shapes(name: str, num_out: int, num_in: int) -> Shapes:
    """Names and shapes of a linear layer with bias."""
    return {name + ".weight": (num_out, num_in), name + ".bias": (num_out,)}


def norm_shapes(name: str, width: int) -> Shapes:
    """Names and shapes of a norm with weight and bias."""
    return {name + ".weight": (width,), name + ".bias": (width,)}
