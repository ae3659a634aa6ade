"""A DeLVM with a few thousand weights: the checkpoint of a training, the converted decoder and the VQGAN."""

import json
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.models.delvm.checkpoint_config import from_published
from mindvlm.models.delvm.names import MODELS, infos_of
from mindvlm.weights.rules.planning import make_plan

VQGAN = {
    "_class_name": "VQGANModel",
    "resolution": 8,
    "hidden_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "no_attn_mid_block": True,
    "z_channels": 6,
    "num_embeddings": 40,
    "quantized_embed_dim": 4,
}
TRAINING = {
    "model_type": "INTERNLM",
    "model": {
        "hidden_size": 24,
        "num_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 8 / 3,
        "vocab_size": 40,
        "layer_norm_epsilon": 1e-5,
        "norm_type": "rmsnorm",
        "dtype": "torch.float32",
    },
    "vq_config": VQGAN,
}
VIT = {**TRAINING, "model_type": "ViT"}
VIT["model"] = {**TRAINING["model"], "norm_type": "layernorm", "mlp_ratio": 2, "mlp_bias": True}


def training_tensors(config: dict = TRAINING, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 tensors under the names of a training."""
    rng = np.random.default_rng(seed)
    model = MODELS[config is VIT]
    infos = make_plan(model.forms["internlm"].table.reverse(), infos_of(from_published(config))).infos
    tensors = {name: rng.normal(0, 0.2, info.shape).astype(np.float32) for name, info in infos.items()}
    return {name: np.abs(array) + 1 if "norm" in name and name.endswith("weight") else array
            for name, array in tensors.items()}  # fmt: skip


def write_training(folder: Path, config: dict = TRAINING, *, seed: int = 0) -> Path:
    """Writes the checkpoint of a training on one device, with its settings in a config.json; returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder / "model_tp0_pp0.pt", MemorySource(training_tensors(config, seed)))
    return folder


def write_vqgan(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Writes the VQGAN in the tensors of a training, as openMUSE publishes it; returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(VQGAN))
    prefix = "model.embedding.vq_model."
    found = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    write_checkpoint(folder / "pytorch_model.bin", MemorySource(found))
    return folder


def write_hf(folder: Path, training: Path) -> Path:
    """Converts the checkpoint of a training to the Hugging Face form; returns the folder."""
    from mindvlm.convert.conversion import ConversionRequest, convert

    convert(ConversionRequest(sources=(training,), target=folder, to="hf"))
    return folder
