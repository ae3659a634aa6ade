"""Reproducible random weights under official names, for tests and benchmarks. Imports no framework.

A tensor depends only on its name, its shape and one seed, so two frameworks in two processes get the same model without
sharing a file. Parts of a tensor can be computed separately.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.source import TensorInfo, TensorSource

BLOCK_ELEMENTS = 1 << 20
BIAS_STD = 0.02
NORM_STD = 0.1
TABLE_STD = 0.3
TABLE_SUFFIXES = ("wte.weight", "position_embedding.weight", "class_embedding", "pos_embed")


def fill_random(array: np.ndarray, name: str, *, seed: int) -> np.ndarray:
    """Fills a C-contiguous float32 array in place and returns it.

    Biases are N(0, 0.02), norm weights N(1, 0.1), lookup tables N(0, 0.3), matrices and kernels N(0, 1/sqrt(inputs)).
    This keeps activations near unit scale at any width (0.02 for 2048 inputs).

    Raises:
        ValueError: the array is not C-contiguous float32.
    """
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ValueError(f"{name}: needs a C-contiguous float32 array, got {array.dtype} with strides {array.strides}")
    flat = array.reshape(-1)
    for block, start in enumerate(range(0, flat.size, BLOCK_ELEMENTS)):
        _fill_block(flat[start : start + BLOCK_ELEMENTS], name, array.shape, block, seed)
    return array


def random_tensor(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Returns the float32 array of `fill_random` for a name and a shape."""
    return fill_random(np.empty(tuple(shape), dtype=np.float32), name, seed=seed)


class RandomSource(TensorSource):
    """A checkpoint of random tensors, generated block by block while it is read.

    Args:
        shapes: name -> shape, in order.
        seed: see `random_tensor`.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], seed: int) -> None:
        self.path = Path(f"<random weights of seed {seed}>")
        self.infos = {name: TensorInfo(name, "float32", tuple(shape)) for name, shape in shapes.items()}
        self._seed = seed

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns the elements [start, stop) of the flattened tensor. Generates whole blocks at both ends."""
        info = self.infos[name]
        first = start // BLOCK_ELEMENTS * BLOCK_ELEMENTS
        last = min(-(-stop // BLOCK_ELEMENTS) * BLOCK_ELEMENTS, info.num_elements)
        values = np.empty(max(last - first, 0), np.float32)
        for offset in range(first, last, BLOCK_ELEMENTS):
            block = values[offset - first : offset - first + BLOCK_ELEMENTS]
            _fill_block(block, name, info.shape, offset // BLOCK_ELEMENTS, self._seed)
        # a view would keep whole blocks alive
        return values if len(values) == stop - start else values[start - first : stop - first].copy()


def _fill_block(block: np.ndarray, name: str, shape: tuple[int, ...], index: int, seed: int) -> None:
    mean, std = _distribution(name, shape)
    digest = hashlib.blake2b(f"{seed}:{name}:{index}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    generator.standard_normal(out=block, dtype=np.float32)
    block *= np.float32(std)
    if mean:
        block += np.float32(mean)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("bias"):
        return 0.0, BIAS_STD
    if name.endswith(TABLE_SUFFIXES):
        return 0.0, TABLE_STD
    if len(shape) == 1:
        return 1.0, NORM_STD
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))
