"""Dropout and noise derived from a counter, so a resumed run uses the same values as an uninterrupted one."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

NUM_ROWS = 1021
ROW_STEP = 617
COUNTER_NAME = "num_passes"
# values of a row of the noise table; longer rows take several
NOISE_WIDTH = 256


class RandomRows(nn.Cell):
    """Base of Cells that take rows of a table of NUM_ROWS random rows.

    A row of the input uses one row of the table, chosen by the step, its position among the rows of all passes and
    replicas, and `index`. Two replicas therefore use the same values as one replica with the rows of both. The CPU
    backend's own random operators have no state that can be read or set.

    Args:
        index: distinguishes the Cells of a model.
        counter: number of passes so far, an int32 scalar; see `new_counter` and `place_dropout`.
    """

    def __init__(self, *, index: int, counter: Parameter):
        super().__init__(auto_prefix=False)
        # bypasses Cell: the counter is not a weight and is not in checkpoints
        object.__setattr__(self, "counter", counter)
        self.index = index
        self.num_passes, self.num_replicas, self.replica = 1, 1, 0

    def first_row(self, num_rows):
        """Returns the index into the table for the first of `num_rows` rows of this pass, an int32 scalar."""
        step, number = self.counter // self.num_passes, self.counter % self.num_passes
        num_earlier = (number * self.num_replicas + self.replica) * num_rows
        return (step % NUM_ROWS) * 389 + (num_earlier % NUM_ROWS) * ROW_STEP + self.index * 83


class RowNoise(RandomRows):
    """Returns values of the normal distribution N(0, 1), (num_rows, width) float32; arguments of `RandomRows`."""

    def __init__(self, *, index: int, counter: Parameter):
        super().__init__(index=index, counter=counter)
        values = np.random.default_rng(NOISE_WIDTH).standard_normal((NUM_ROWS, NOISE_WIDTH))
        self.table = Tensor(values, ms.float32)

    def construct(self, num_rows: int, width: int):
        num_parts = num_rows * -(-width // NOISE_WIDTH)
        values = table_rows(self.table, self.first_row(num_parts), num_parts)
        return values.reshape((num_rows, -1))[:, :width]


class RowDropout(RandomRows):
    """Zeroes elements with probability p in training and scales the others by 1 / (1 - p). x (..., width).

    Args:
        p: probability, from 0 to below 1.
        width: size of the last axis.
        index, counter: see `RandomRows`.
        columns: range [start, stop) of the width that x covers; None for all of it.
    """

    # the key of a graph cannot cover the counter, which belongs to no Cell
    ONLY_IN_TRAINING = frozenset({"counter", "masks"})

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
        super().__init__(index=index, counter=counter)
        self.masks = mask_tensor(p, width, dtype, columns)
        self.width = self.masks.shape[1]

    def construct(self, x):
        if not self.training:
            return x
        rows = x.reshape((-1, self.width))
        return (rows * table_rows(self.masks, self.first_row(rows.shape[0]), rows.shape[0])).reshape(x.shape)


def table_rows(table, first, num_rows):
    """Returns the rows of a table from `first` on, (num_rows, width)."""
    return ops.gather(table, (row_steps(num_rows) + first) % NUM_ROWS, 0)


@ops.constexpr
def row_steps(num_rows: int) -> Tensor:
    """Returns offsets into a table, (num_rows,) int32. ROW_STEP is coprime to NUM_ROWS."""
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
    """Returns a counter for all `RandomRows` Cells of a model; `TrainStep` increments it."""
    return Parameter(Tensor(0, ms.int32), name=COUNTER_NAME, requires_grad=False)


def place_dropout(model: nn.Cell, *, num_passes: int, num_replicas: int, replica: int) -> None:
    """Sets the position of this replica for a model's dropout and noise.

    Args:
        num_passes: passes per step on each replica.
        num_replicas: data-parallel replicas.
        replica: index of this replica.
    """
    for _, cell in model.cells_and_names():
        if isinstance(cell, RandomRows):
            cell.num_passes, cell.num_replicas, cell.replica = num_passes, num_replicas, replica


def dropout_counter(model: nn.Cell) -> Parameter | None:
    """Returns the counter of a model's dropout and noise, or None."""
    return next((cell.counter for _, cell in model.cells_and_names() if isinstance(cell, RandomRows)), None)
