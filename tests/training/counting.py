"""A step that counts instead of computing, for tests of the loop around it."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mindvlm.training.step_runner import Outcome


class CountingStepRunner:
    """Adds 1 to a state at each step; the loss is `1 / (step + 1)`, or what `bad` says for a step (0: no labels)."""

    bad: dict[int, float] = {}
    stop_at: int | None = None
    sharded = None
    has_loss_scale = False

    def __init__(self, model, *args, **kwargs):
        self.count = Parameter(Tensor(0, ms.int32), name="count")
        self.seen: list[list[str]] = []

    def run(self, learning_rate, passes):
        step = int(self.count.asnumpy())
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.count.set_data(Tensor(step + 1, ms.int32))
        self.seen.append([origin for one in passes for origin in one.origins])
        loss = self.bad.get(step, 1 / (step + 1))
        return Outcome(loss, learning_rate, is_finite=np.isfinite(loss), has_labels=loss != 0)

    def fill_masters(self):
        pass

    def start_at(self, step):
        pass

    @property
    def optimizer_state(self):
        return {"count": self.count}
