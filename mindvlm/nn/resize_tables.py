"""Resizing of a pretrained decoder's tables before training: learned positions and token embeddings."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.nn.positions import NUM_OFFSET_ROWS


def keep_shape(name: str, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]], **_: Any) -> np.ndarray:
    """Returns a pretrained tensor as it is; what else is known about it is ignored.

    Raises:
        UserError: the model's tensor of that name has another shape.
    """
    if array.shape != tuple(shapes[name]):
        raise UserError(f"tensor {name} has shape {list(array.shape)}; the model expects {list(shapes[name])}")
    return array


def interpolate_positions(table: np.ndarray, num_positions: int, *, num_offset_rows: int = NUM_OFFSET_ROWS):
    """Interpolates a table of learned positions to another number of positions.

    Position p of the new table lies at (p + 1/2) n / m - 1/2 of the old one, for n old and m new positions: linear
    interpolation between cell centres, as in `torch.nn.functional.interpolate`. Offset rows are unchanged.

    Args:
        table: (n + num_offset_rows, hidden_size), as OPT's `embed_positions.weight` (2050 rows for 2048 positions).
        num_positions: m.

    Returns:
        (m + num_offset_rows, hidden_size) of the table's dtype.

    Raises:
        UserError: the table has no positions, or `num_positions` is below 1.
    """
    old = len(table) - num_offset_rows
    if old < 1 or num_positions < 1:
        raise UserError(f"positions: cannot resize a table of {old} to {num_positions}; expected at least 1 each")
    if old == num_positions:
        return table
    offset_rows, rows = table[:num_offset_rows], table[num_offset_rows:].astype(np.float32, copy=False)
    places = (np.arange(num_positions) + 0.5) * (old / num_positions) - 0.5
    places = np.clip(places, 0, old - 1)
    lower = np.floor(places).astype(np.int64)
    upper = np.minimum(lower + 1, old - 1)
    share = (places - lower).astype(np.float32)[:, None]
    stretched = rows[lower] * (1 - share) + rows[upper] * share
    return np.concatenate([offset_rows, stretched.astype(table.dtype)])


def resize_embeddings(table: np.ndarray, num_rows: int, *, num_mean_rows: int = 0, seed: int = 0, std: float = 0.02):
    """Resizes a table of token embeddings; new rows are drawn from a normal distribution.

    Args:
        table: (rows, hidden_size).
        num_rows: number of rows of the result.
        num_mean_rows: number of last rows that are set to the mean of all rows before them.
        std: standard deviation of the new rows.

    Returns:
        (num_rows, hidden_size) of the table's dtype.

    Raises:
        UserError: `num_rows` is not above `num_mean_rows`.
    """
    if num_rows <= num_mean_rows:
        raise UserError(f"embeddings: cannot resize to {num_rows} rows; expected more than {num_mean_rows}")
    kept = table[: num_rows - num_mean_rows].astype(np.float32, copy=False)
    num_drawn = num_rows - num_mean_rows - len(kept)
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal((num_drawn, table.shape[1])) * std
    rows = np.concatenate([kept, drawn.astype(np.float32)])
    mean = np.broadcast_to(rows.mean(axis=0, keepdims=True), (num_mean_rows, table.shape[1]))
    return np.concatenate([rows, mean]).astype(table.dtype)
