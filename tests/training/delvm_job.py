"""Training jobs of a DeLVM with a few thousand weights, on files of random codes."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mindvlm.models.delvm.token_files import write_token_file
from mindvlm.training.job_file import lay_over, set_dotted
from tests.tiny_delvm import TRAINING, VQGAN, training_tensors, write_vqgan

VOCAB_SIZE = VQGAN["num_embeddings"]
MODEL = {
    "family": "delvm",
    "name": "tiny",
    "model": {
        "input_embedding": "codebook",
        "max_length": 64,
        "language_model": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "rms_norm_eps": 1e-5,
            "qkv_bias": True,
            "o_bias": True,
            "use_dynamic_ntk": False,
            "use_logn_attn": False,
        },
        "vqgan": {key: value for key, value in VQGAN.items() if not key.startswith("_")},
    },
}


def write_codes(folder: Path, lengths: list[int], *, name: str = "train", seed: int = 0) -> None:
    """Writes a file of sentences of random codes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_token_file(folder / f"{name}.bin", [rng.integers(0, VOCAB_SIZE, length).tolist() for length in lengths])


def write_job(folder: Path, **changes: Any) -> Path:
    """Writes model, VQGAN, codes and job into the folder; a change is named by its key, with "__" between sections."""
    if not (folder / "vqgan").exists():
        write_vqgan(folder / "vqgan", training_tensors(TRAINING))
        write_codes(folder / "codes", [32, 64, 50, 17, 96, 31, 20, 64, 45, 128] * 2)
        (folder / "model.yaml").write_text(yaml.safe_dump(MODEL))
    job = {
        "model_config": "model.yaml",
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "mode": "pynative",
        "seed": 1024,
        "data": {"codes": "codes", "pack_length": 96, "segment_length": 32, "min_length": 16},
        "init": {"weights": ["vqgan"], "random": ["^language_model"]},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "no_decay": []},
        "schedule": {"total_steps": 6, "warmup_steps": 2},
        "log_every": 1,
        "save_every": 3,
    }
    for key, value in changes.items():
        set_dotted(job, key.replace("__", "."), value)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(lay_over({}, job)))
    return path
