"""Dropout whose masks follow from a counter, so that a resumed run drops what an uninterrupted one would."""

import functools

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

NUM_ROWS = 1021
COUNTER_NAME = "num_passes"


class RowDropout(nn.Cell):
    """Zeroes elements with probability p in training and scales the others by 1 / (1 - p). x (..., width).

    Every row of x takes a row of one table of masks; which one depends on the row, the counter and `index`. (The CPU
    backend's own Dropout keeps a random state that can neither be read nor set.)

    Args:
        p: from 0 to below 1.
        width: of the last axis.
        index: sets Cells apart that drop in the same pass.
        counter: an int32 scalar that is another one in every pass; see `new_counter`.
    """

    def __init__(self, p: float, width: int, *, index: int, counter: Parameter, dtype=ms.float32):
        super().__init__(auto_prefix=False)
        # past Cell's own bookkeeping: the counter is no weight of the model and in no checkpoint of weights
        object.__setattr__(self, "counter", counter)
        self.masks = Tensor(mask_table(p, width), dtype)
        self.width = width
        self.index = index

    def construct(self, x):
        if not self.training:
            return x
        rows = x.reshape((-1, self.width))
        # steps that share no divisor with the size of the table
        first = (self.counter % NUM_ROWS) * 389 + self.index * 83
        chosen = (ops.arange(rows.shape[0]).astype(ms.int32) * 617 + first) % NUM_ROWS
        return (rows * ops.gather(self.masks, chosen, 0)).reshape(x.shape)


@functools.cache
def mask_table(p: float, width: int) -> np.ndarray:
    """(NUM_ROWS, width) float32: 0 with probability p, 1 / (1 - p) elsewhere; the same for the same arguments."""
    kept = np.random.default_rng([width, int(p * 1e6)]).random((NUM_ROWS, width)) >= p
    return (kept / (1 - p)).astype(np.float32)


def new_counter() -> Parameter:
    """The counter that all `RowDropout` of a model share; `TrainStep` moves it."""
    return Parameter(Tensor(0, ms.int32), name=COUNTER_NAME, requires_grad=False)


def dropout_counter(model: nn.Cell) -> Parameter | None:
    """The counter of a model's dropout; None if it has none."""
    return next((cell.counter for _, cell in model.cells_and_names() if isinstance(cell, RowDropout)), None)
