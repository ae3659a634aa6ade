"""A TinyLLaVA with a few thousand weights in a Hugging Face folder, for tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.hf_shapes import tinyllava_shapes
from tests.processing.text.small_pieces import write_piece_files

VOCAB_SIZE = 330
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tokenizer_model_max_length": 256,
    "pad_token_id": 0,
    "mm_vision_tower": "siglip",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
DIALECTS = {
    "llama": {"model_type": "tiny_llava", "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "phi": {"model_type": "tiny_llava_phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "stablelm": {"model_type": "tiny_llava_stablelm", "num_key_value_heads": 4, "rope_pct": 0.5, "use_qkv_bias": True},
}


def hf_config(dialect: str, **changes) -> dict:
    """Returns the contents of config.json."""
    return {**SIZES, **DIALECTS[dialect], "vision_config": TOWER, **changes}


def hf_tensors(config: dict, dialect: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 tensors under the names of TinyLLaVABench."""
    rng = np.random.default_rng(seed)
    shapes = tinyllava_shapes(config, dialect)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny_tinyllava(folder: Path, *, dialect: str = "llama", seed: int = 0, **changes) -> Path:
    """Writes config.json, weights and a Llama tokenizer to the folder `model` and returns its path."""
    config, model = hf_config(dialect, **changes), folder / "model"
    write_piece_files(model)
    (model / "config.json").write_text(json.dumps(config))
    save_file(hf_tensors(config, dialect, seed), model / "model.safetensors", metadata={"format": "pt"})
    return model
