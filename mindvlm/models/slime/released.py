"""The config.json files of the released SliME models: the keys with an effect.

The files have 714 tensors (786 with 40 layers, 1146 with 80). Two of them are buffers of one value, which the models
lack.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 1024,
    "mm_projector_type": "gated",
    "mm_learnable_gated": -1,
    "mm_resampler_type": "cosine",
    "mm_resampler_topp": 0.95,
    "mm_resampler_dim": 144,
    "mm_resampler_temp": 1.0,
    "mm_patch_merge_type": "spatial",
    "image_aspect_ratio": "anyres",
    "tokenizer_model_max_length": 2048,
}
_VICUNA = {"vocab_size": 32000, "rope_theta": 1e4, "max_position_embeddings": 4096, "seperator": 1919}
_VICUNA |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 8192, "seperator": 11}
_LLAMA_3 |= {"bos_token_id": 128000, "eos_token_id": 128009, "pad_token_id": 128001, "num_key_value_heads": 8}


def _sizes(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
    }


def vicuna_7b_config() -> dict[str, Any]:
    """Returns the config.json of yifanzhang114/SliME-vicuna-7B."""
    return {**_COMMON, **_sizes(4096, 11008, 32, 32), **_VICUNA}


def vicuna_13b_config() -> dict[str, Any]:
    """Returns the config.json of yifanzhang114/SliME-vicuna-13B."""
    return {**_COMMON, **_sizes(5120, 13824, 40, 40), **_VICUNA}


def llama3_8b_config() -> dict[str, Any]:
    """Returns the config.json of yifanzhang114/SliME-Llama3-8B."""
    return {**_COMMON, **_sizes(4096, 14336, 32, 32), **_LLAMA_3}


def llama3_70b_config() -> dict[str, Any]:
    """Returns the config.json of yifanzhang114/SliME-llama3-70B, merged."""
    return {**_COMMON, **_sizes(8192, 28672, 80, 64), **_LLAMA_3}
