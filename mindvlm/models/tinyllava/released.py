"""The config.json files of the released TinyLLaVA models: the keys with an effect, and the config of the tower.

The models have 877, 765 and 626 tensors with 3,186,888,224, 2,048,820,768 and 1,504,353,824 values.
"""

from typing import Any

from mindvlm.models.hf.towers import CLIP_336, SIGLIP_384

_COMMON: dict[str, Any] = {
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}


def phi_config() -> dict[str, Any]:
    """Returns the config.json of bczhou/TinyLLaVA-3.1B."""
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
        "vision_config": dict(SIGLIP_384),
    }


def stablelm_config() -> dict[str, Any]:
    """Returns the config.json of bczhou/TinyLLaVA-2.0B."""
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
        "vision_config": dict(SIGLIP_384),
    }


def llama_config() -> dict[str, Any]:
    """Returns the config.json of bczhou/TinyLLaVA-1.5B."""
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
        "vision_config": dict(SIGLIP_384),
    }


def legacy_config() -> dict[str, Any]:
    """Returns the config.json of bczhou/tiny-llava-v1-hf, the 1.4B."""
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
        "vision_config": dict(CLIP_336),
    }
