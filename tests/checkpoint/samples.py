"""Tensors of every dtype that the formats share, and the files that the original libraries write of them."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "uint64": torch.uint64,
    "uint32": torch.uint32,
    "uint16": torch.uint16,
    "bool": torch.bool,
}
# "__metadata__" is no name of a tensor in any format
NAMES = st.text(
    st.characters(codec="ascii", categories=["L", "N"], include_characters="._"), min_size=1, max_size=20
).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 50).to(DTYPES[dtype])


def storage(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a torch tensor as the readers hand them out."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


state_dicts = st.dictionaries(
    NAMES, st.builds(random_tensor, st.sampled_from(sorted(DTYPES)), SHAPES, st.integers(0, 99)), min_size=1, max_size=6
)


def write_torch(path: Path, tensors: dict) -> None:
    torch.save(tensors, path)


def write_legacy(path: Path, tensors: dict) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path, tensors: dict) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


WRITERS = {"zip.bin": write_torch, "legacy.pt": write_legacy, "plain.safetensors": write_safetensors}
