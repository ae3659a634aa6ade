"""A SliME with a few thousand weights in a Hugging Face folder, for tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.names import HF, STATISTICS, infos_of
from mindvlm.weights.rules.planning import make_plan
from tests.processing.text.small_pieces import write_piece_files

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tokenizer_model_max_length": 64,
    "mm_vision_tower": "./vision_tower",
    "mm_vision_select_layer": -2,
    "mm_hidden_size": 128,
    "mm_projector_type": "gated",
    "mm_learnable_gated": -1,
    "mm_resampler_type": "cosine",
    "mm_resampler_topp": 0.6,
    "mm_resampler_dim": 4,
    "mm_resampler_temp": 4.0,
    "mm_patch_merge_type": "spatial",
    "image_aspect_ratio": "anyres",
    "seperator": 11,
}


def hf_tensors(seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """Returns random float32 tensors under the published names."""
    rng = np.random.default_rng(seed)
    config = from_hf_config({**CONFIG, **changes}, vision_config=TOWER)
    shapes = {name: info.shape for name, info in make_plan(HF.reverse(), infos_of(config)).infos.items()}
    shapes |= {f"model.mm_projector.{name}": (1,) for name in STATISTICS}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny_slime(folder: Path, *, seed: int = 0, **changes) -> Path:
    """Writes config.json, weights, the tower's config and a Llama tokenizer to the folder `model`; returns its path."""
    model = folder / "model"
    write_piece_files(model)
    (model / "vision_tower").mkdir(exist_ok=True)
    (model / "vision_tower" / "config.json").write_text(json.dumps(TOWER))
    (model / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(hf_tensors(seed), model / "model.safetensors", metadata={"format": "pt"})
    return model


def write_tiny_parts(folder: Path, **changes) -> tuple[Path, Path]:
    """Writes what the first run starts from: the folders `llm`, with a tokenizer, and `clip`; returns their paths."""
    write_piece_files(folder / "llm")
    (folder / "clip").mkdir()
    tower = "model.vision_tower.vision_tower."
    decoder = {key: value for key, value in CONFIG.items() if not key.startswith(("mm_", "image_"))}
    decoder |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    tensors = hf_tensors(1, **changes)
    parts = {
        "llm": (
            decoder,
            {n: t for n, t in tensors.items() if "projector" not in n and "vision" not in n and "sampler" not in n},
        ),
        "clip": (TOWER, {n.removeprefix(tower): t for n, t in tensors.items() if n.startswith(tower)}),
    }
    for name, (config, part) in parts.items():
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(part, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "llm", folder / "clip"


# Llama-3-70B's ratios: 64 query and 8 key heads, an untied head, an MLP 3.5 times as wide
LIKE_70B = {
    "vocab_size": 332,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
# so many ids that four processes can share them
ADDED_TOKENS = '{"<a>": 330, "<b>": 331}'


def make_like_70b(model: Path) -> None:
    """Gives the folder of a tiny SliME a decoder with the ratios of Llama-3-70B."""
    (model / "config.json").write_text(json.dumps({**CONFIG, **LIKE_70B}))
    (model / "added_tokens.json").write_text(ADDED_TOKENS)
    save_file(hf_tensors(**LIKE_70B), model / "model.safetensors", metadata={"format": "pt"})
