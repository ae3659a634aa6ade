"""Dropout with masks derived from a counter, so a resumed run uses the same masks as an uninterrupted one."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

NUM_ROWS = 1021
ROW_STEP = 617
COUNTER_NAME = "num_passes"


class RowDropout(nn.Cell):
    """Zeroes elements with probability p in training and scales the others by 1 / (1 - p). x (..., width).

    Each row of x uses one row of a mask table, chosen by the step, the row's position among the rows of all passes and
    replicas, and `index`. Two replicas therefore drop the same elements as one replica with the rows of both. The CPU
    backend's own Dropout has no random state that can be read or set.

    Args:
        p: probability, from 0 to below 1.
        width: size of the last axis.
        index: distinguishes the Cells of a model.
        counter: number of passes so far, an int32 scalar; see `new_counter` and `place_dropout`.
        columns: range [start, stop) of the width that x covers; None for all of it.
    """

    def __init__(
        self,
        p: float,
        width: int,
        *,
        index: int,
        counter: Parameter,
        dtype=ms.float32,
        columns: tuple[int, int] | None = None,
    ):
        super().__init__(auto_prefix=False)
        # bypasses Cell: the counter is not a weight and is not in checkpoints
        object.__setattr__(self, "counter", counter)
        self.masks = mask_tensor(p, width, dtype, columns)
        self.width = self.masks.shape[1]
        self.index = index
        self.num_passes, self.num_replicas, self.replica = 1, 1, 0

    def construct(self, x):
        if not self.training:
            return x
        rows = x.reshape((-1, self.width))
        return (rows * row_masks(self.masks, self.first_row(rows.shape[0]), rows.shape[0])).reshape(x.shape)

    def first_row(self, num_rows):
        """Returns the index into the mask table for the first row of this pass, an int32 scalar."""
        step, number = self.counter // self.num_passes, self.counter % self.num_passes
        num_earlier = (number * self.num_replicas + self.replica) * num_rows
        return (step % NUM_ROWS) * 389 + (num_earlier % NUM_ROWS) * ROW_STEP + self.index * 83


def row_masks(masks, first, num_rows):
    """Returns the rows of a mask table from `first` on, (num_rows, width)."""
    return ops.gather(masks, (row_steps(num_rows) + first) % NUM_ROWS, 0)


@ops.constexpr
def row_steps(num_rows: int) -> Tensor:
    """Returns offsets into the mask table, (num_rows,) int32. ROW_STEP is coprime to NUM_ROWS."""
    return Tensor(np.arange(num_rows) * ROW_STEP % NUM_ROWS, ms.int32)


@functools.cache
def mask_tensor(p: float, width: int, dtype, columns: tuple[int, int] | None) -> Tensor:
    """Returns columns of the mask table, shared by all Cells with the same dropout."""
    return Tensor(mask_table(p, width)[:, slice(*(columns or (0, width)))].copy(), dtype)


@functools.cache
def mask_table(p: float, width: int) -> np.ndarray:
    """Returns a deterministic mask table (NUM_ROWS, width) float32: 0 with probability p, else 1 / (1 - p)."""
    kept = np.random.default_rng([width, int(p * 1e6)]).random((NUM_ROWS, width)) >= p
    return (kept / (1 - p)).astype(np.float32)


def new_counter() -> Parameter:
    """Returns a counter for all `RowDropout` Cells of a model; `TrainStep` increments it."""
    return Parameter(Tensor(0, ms.int32), name=COUNTER_NAME, requires_grad=False)


def place_dropout(model: nn.Cell, *, num_passes: int, num_replicas: int, replica: int) -> None:
    """Sets the position of this replica for a model's dropout.

    Args:
        num_passes: passes per step on each replica.
        num_replicas: data-parallel replicas.
        replica: index of this replica.
    """
    for _, cell in model.cells_and_names():
        if isinstance(cell, RowDropout):
            cell.num_passes, cell.num_replicas, cell.replica = num_passes, num_replicas, replica


def dropout_counter(model: nn.Cell) -> Parameter | None:
    """Returns the counter of a model's dropout, or None."""
    return next((cell.counter for _, cell in model.cells_and_names() if isinstance(cell, RowDropout)), None)
