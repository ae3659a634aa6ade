"""A Vary with a few thousand random weights and all files of a run: YAML, vocabulary, checkpoint."""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from mindvlm.api import load
from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.convert.random_weights import random_tensor
from mindvlm.models.vary.config import parse_config
from mindvlm.models.vary.model import build_model
from mindvlm.models.vary.tokenizer import COMPACT_SPECIAL_TOKENS
from mindvlm.nn.parameters import parameter_shapes
from tests.processing.text.small_bpe import small_vocabulary, write_bpe_files
from tests.processing.text.small_vocabulary import small_ranks, write_rank_file

VOCAB_SIZE = len(small_ranks()) + len(COMPACT_SPECIAL_TOKENS)
IMAGE_TOKEN_LEN = 8

CONFIG = {
    "family": "vary",
    "name": "tiny",
    "checkpoint": "tiny.safetensors",
    "device": "cpu",
    "mode": "pynative",
    "model": {
        "image_token_len": IMAGE_TOKEN_LEN,
        "max_length": 320,
        "language_model": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "training_length": 512,
        },
        "vision_tower": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 32],
            "patch_size": 8,
        },
        "vision_vocabulary": {
            "embed_dim": 12,
            "depth": 2,
            "num_heads": 2,
            "global_attn_indexes": [1],
            "window_size": 3,
            "image_size": [32, 64],
            "patch_size": 4,
            "out_chans": 6,
            "net_2_channels": 8,
            "net_3_channels": 10,
        },
    },
    "processor": {
        "vocab_file": "small.tiktoken",
        "special_tokens": list(COMPACT_SPECIAL_TOKENS),
        "system": "",
        "num_image_tokens": IMAGE_TOKEN_LEN,
        "clip": {"size": [16, 32], "resize": "squash"},
        "high": {"size": [32, 64], "resize": "squash"},
    },
    "generation": {"max_new_tokens": 8},
}


def tiny_config(**changes) -> dict:
    """Returns the YAML's mapping; `model__language_model__hidden_size=64` changes one value."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[key] = copy.deepcopy(value)
    return config


def tiny_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 tensors under native names."""
    shapes = parameter_shapes(build_model(parse_config(config, Path("tiny.yaml")).model))
    return {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}


def write_yaml(folder: Path, config: dict, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def write_tiny_vary(folder: Path, *, weights: dict[str, np.ndarray] | None = None, **changes) -> Path:
    """Writes a complete run to the folder and returns the path of its YAML."""
    config = tiny_config(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    write_rank_file(folder / "small.tiktoken")
    write_checkpoint(folder / "tiny.safetensors", MemorySource(weights or tiny_weights(config)))
    return write_yaml(folder, config)


def picture(seed: int = 0, size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Returns an image of noise with the size (width, height)."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@functools.cache
def tiny_model(mode: str = "pynative"):
    """Returns one loaded model of each mode, shared by tests that do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return load(write_tiny_vary(Path(folder), mode=mode))


TINY_OPT_CHANGES = {
    "checkpoint": "tiny_opt.safetensors",
    "model__vision_tower": None,
    "model__freeze_vision_tower": False,
    "model__language_model": {
        "vocab_size": len(small_vocabulary()) + 3,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "norm": "layer_norm",
        "position": "learned",
        "max_position_embeddings": 320,
        "mlp": "plain",
        "hidden_act": "relu",
        "o_bias": True,
        "tie_word_embeddings": True,
    },
    "processor": {
        "vocab_file": ".",
        "template": "v1",
        "system": "A page.",
        "num_image_tokens": IMAGE_TOKEN_LEN,
        "clip": None,
        "high": {"size": [32, 64], "resize": "squash"},
    },
}


def tiny_opt_config(**changes) -> dict:
    """Returns the YAML's mapping of a Vary-tiny; changes as in `tiny_config`."""
    return tiny_config(**(TINY_OPT_CHANGES | changes))


def write_tiny_opt(folder: Path, *, weights: dict[str, np.ndarray] | None = None, **changes) -> Path:
    """Writes a complete run of a Vary-tiny to the folder and returns the path of its YAML."""
    config = tiny_opt_config(**changes)
    write_bpe_files(folder)
    write_checkpoint(folder / "tiny_opt.safetensors", MemorySource(weights or tiny_weights(config)))
    return write_yaml(folder, config, "tiny_opt.yaml")
