"""Fixed positions of the resamplers' queries, and their resizing to the grid of the keys.

G edge of the queries' grid, K edge of the keys' grid, W width.
"""

import math

import numpy as np

# a of the bicubic kernel, as in torch
BICUBIC = -0.75


def sine_table(width: int, grid: int) -> np.ndarray:
    """Returns the positions of a grid, (G * G, W) float32.

    The first half of a row encodes the column, the second half the line: sines, then cosines.

    Args:
        width: W, a multiple of 4.
        grid: G.
    """
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / quarter)
    angles = np.arange(grid, dtype=np.float32)[:, None] * frequencies
    along = np.concatenate((np.sin(angles), np.cos(angles)), 1)
    columns = np.broadcast_to(along[None], (grid, grid, width // 2))
    lines = np.broadcast_to(along[:, None], (grid, grid, width // 2))
    return np.concatenate((columns, lines), 2).reshape(grid * grid, width).astype(np.float32)


def fixed_positions(shape: tuple[int, ...]) -> np.ndarray:
    """Returns the positions of queries, (G * G, W) float32, rounded to half precision as in the original program."""
    return sine_table(shape[1], math.isqrt(shape[0])).astype(np.float16).astype(np.float32)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Returns the matrix (K * K, G * G) float32 that resizes a grid bicubically, as torch's `interpolate` does.

    Args:
        old: G.
        new: K.
    """
    along = np.zeros((new, old))
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(np.int64)
    for offset in range(-1, 3):
        weights = bicubic_kernel(np.abs(centres - first - offset))
        np.add.at(along, (np.arange(new), np.clip(first + offset, 0, old - 1)), weights)
    return np.kron(along, along).astype(np.float32)


def bicubic_kernel(distance: np.ndarray) -> np.ndarray:
    """Returns the weights of pixels at these distances, from 0 to 2."""
    near = ((BICUBIC + 2) * distance - (BICUBIC + 3)) * distance**2 + 1
    far = BICUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
