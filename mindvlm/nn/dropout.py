"""Dropout whose masks follow from a counter, so that a resumed run drops what an uninterrupted one would."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

NUM_ROWS = 1021
ROW_STEP = 617
COUNTER_NAME = "num_passes"


class RowDropout(nn.Cell):
    """Zeroes elements with probability p in training and scales the others by 1 / (1 - p). x (..., width).

    Every row of x takes a row of one table of masks; which one depends on the step, on where the row is among those of
    all passes and replicas, and on `index`: two replicas drop what one with the rows of both would. (The CPU backend's
    own Dropout keeps a random state that can neither be read nor set.)

    Args:
        p: from 0 to below 1.
        width: of the last axis.
        index: sets Cells apart that drop in the same pass.
        counter: an int32 scalar, the number of passes so far; see `new_counter` and `place_dropout`.
        columns: first and last + 1 of the width, where x has only these.
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
        # past Cell's own bookkeeping: the counter is no weight of the model and in no checkpoint of weights
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
        """Where in the table the first of this pass's rows is, an int32 scalar."""
        step, number = self.counter // self.num_passes, self.counter % self.num_passes
        num_earlier = (number * self.num_replicas + self.replica) * num_rows
        return (step % NUM_ROWS) * 389 + (num_earlier % NUM_ROWS) * ROW_STEP + self.index * 83


def row_masks(masks, first, num_rows):
    """Rows of a table of masks from `first` on, (num_rows, width)."""
    return ops.gather(masks, (row_steps(num_rows) + first) % NUM_ROWS, 0)


@ops.constexpr
def row_steps(num_rows: int) -> Tensor:
    """(num_rows,) int32, in steps that share no divisor with the size of the table."""
    return Tensor(np.arange(num_rows) * ROW_STEP % NUM_ROWS, ms.int32)


@functools.cache
def mask_tensor(p: float, width: int, dtype, columns: tuple[int, int] | None) -> Tensor:
    """Columns of the table of masks, once in memory for all Cells that drop alike."""
    return Tensor(mask_table(p, width)[:, slice(*(columns or (0, width)))].copy(), dtype)


@functools.cache
def mask_table(p: float, width: int) -> np.ndarray:
    """(NUM_ROWS, width) float32: 0 with probability p, 1 / (1 - p) elsewhere; the same for the same arguments."""
    kept = np.random.default_rng([width, int(p * 1e6)]).random((NUM_ROWS, width)) >= p
    return (kept / (1 - p)).astype(np.float32)


def new_counter() -> Parameter:
    """The counter that all `RowDropout` of a model share; `TrainStep` moves it."""
    return Parameter(Tensor(0, ms.int32), name=COUNTER_NAME, requires_grad=False)


def place_dropout(model: nn.Cell, *, num_passes: int, num_replicas: int, replica: int) -> None:
    """Tells a model's dropout which rows are its own: `num_passes` make a step, on each of `num_replicas` replicas."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, RowDropout):
            cell.num_passes, cell.num_replicas, cell.replica = num_passes, num_replicas, replica


def dropout_counter(model: nn.Cell) -> Parameter | None:
    """The counter of a model's dropout; None if it has none."""
    return next((cell.counter for _, cell in model.cells_and_names() if isinstance(cell, RowDropout)), None)
