"""The configuration of the released Vary-tiny and the names and shapes of its state dict, without torch.

Reproduces the tensor inventory of Vary-tiny: OPT-125M (facebook/opt-125m with 50268 tokens and 4096 positions), SAM-B
with two more convolutions, one projector. `lm_head.weight` is tied to the token embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvlm.convert.reference.vary_layout import (
    VOCABULARY_DEFAULTS,
    Shapes,
    linear_shapes,
    norm_shapes,
    vocabulary_config,
    vocabulary_shapes,
)

POSITION_OFFSET = 2
"""OPT keeps two rows in front of its position table: position p is row p + 2."""


def vary_tiny_config() -> dict[str, Any]:
    """The config.json of the released Vary-tiny (keys that act), with the vision vocabulary written out."""
    return {
        "architectures": ["varyOPTForCausalLM"],
        "model_type": "vary",
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 4096,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "tie_word_embeddings": True,
        "vocab_size": 50268,
        "image_token_len": 256,
        "im_patch_token": 50265,
        "im_start_token": 50266,
        "im_end_token": 50267,
        "vision_high_config": dict(VOCABULARY_DEFAULTS),
    }


def parameter_shapes(config: Mapping[str, Any], *, tower: str = "vision_tower_2") -> Shapes:
    """Official name -> shape of every tensor of a Vary-tiny with this config, linear weights as (out, in).

    Args:
        config: a config.json; the released vision vocabulary where it is silent about `vision_high_config`.
        tower: what the vision vocabulary is called, "vision_tower_2" (published weights) or "vision_tower".

    Raises:
        ValueError: an OPT with other layers than the 125M one: norms behind the blocks, no biases, projected
            embeddings.
    """
    _require_opt_125m_layers(config)
    hidden, ffn_dim, vocab_size = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    vocabulary = vocabulary_config(config)
    num_positions = config["max_position_embeddings"] + POSITION_OFFSET
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (vocab_size, hidden),
        "model.decoder.embed_positions.weight": (num_positions, hidden),
        **norm_shapes("model.decoder.final_layer_norm", hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{prefix}self_attn.{name}", hidden, hidden)
        shapes |= norm_shapes(prefix + "self_attn_layer_norm", hidden)
        shapes |= linear_shapes(prefix + "fc1", ffn_dim, hidden) | linear_shapes(prefix + "fc2", hidden, ffn_dim)
        shapes |= norm_shapes(prefix + "final_layer_norm", hidden)
    shapes |= vocabulary_shapes(vocabulary, prefix=f"model.{tower}.")
    shapes |= linear_shapes("model.mm_projector", hidden, vocabulary["net_3_channels"])
    shapes["lm_head.weight"] = (vocab_size, hidden)
    return shapes


def _require_opt_125m_layers(config: Mapping[str, Any]) -> None:
    expected = {
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "word_embed_proj_dim": config["hidden_size"],
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]!r}, only {value!r} is supported")
