"""Adapter folders as peft writes them, and base models in memory."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mindvlm.checkpoint import MemorySource, RawTensor, TensorSource
from tests.checkpoint.samples import storage

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], *, weights="adapter_model.safetensors", **config):
    """Write an adapter whose keys lack only `base_model.model.`; `config` overrides or adds settings."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "fan_in_fan_out": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {PREFIX + key: tensor for key, tensor in tensors.items()}
    if weights.endswith(".bin"):
        torch.save(named, folder / weights)
    else:
        save_file({key: tensor.contiguous().clone() for key, tensor in named.items()}, folder / weights)
    return folder


def source_of(tensors: Mapping[str, torch.Tensor]) -> MemorySource:
    return MemorySource(
        {
            name: RawTensor("bfloat16", tuple(tensor.shape), storage(tensor))
            if tensor.dtype == torch.bfloat16
            else storage(tensor)
            for name, tensor in tensors.items()
        },
        path="base",
    )


def read_tensor(source: TensorSource, name: str, chunk_bytes: int | None = None) -> torch.Tensor:
    """Read a tensor whole or in chunks, as torch sees it."""
    info = source.infos[name]
    if chunk_bytes is None:
        data = source.read(name).data
    else:
        data = np.concatenate([*source.chunks(name, chunk_bytes)]).reshape(info.shape)
    if info.dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(data))


def whole_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers, whose products and sums are exact in float32 in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
