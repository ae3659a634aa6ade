"""The loss of a pass: averaged, and scaled dynamically for float16 (Micikevicius et al., arXiv 1710.03740)."""

from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.core.errors import UserError

# the scaled value is the sum of the token losses, so a large step may need a scale below 1
MIN_SCALE, MAX_SCALE = 2.0**-16, 2.0**24


@dataclass(kw_only=True)
class LossScaleConfig:
    """Dynamic scale: halved when a gradient overflows, doubled after `growth_interval` steps without overflow.

    Attributes:
        hysteresis: overflows since the last doubling from which on each halves the scale.
        minimum, maximum: limits of the scale.
    """

    initial: float = 2.0**16
    growth_interval: int = 2000
    hysteresis: int = 1
    minimum: float = MIN_SCALE
    maximum: float = MAX_SCALE

    def __post_init__(self):
        if not 1 <= self.initial <= MAX_SCALE or self.growth_interval < 1:
            raise UserError(
                f"loss_scale: initial is {self.initial} and growth_interval {self.growth_interval}; expected 1 to "
                f"{MAX_SCALE:.0f} and at least 1"
            )
        if self.hysteresis < 1:
            raise UserError(f"loss_scale.hysteresis is {self.hysteresis}; expected at least 1")
        if not MIN_SCALE <= self.minimum <= self.initial <= self.maximum <= MAX_SCALE:
            raise UserError(
                f"loss_scale: minimum is {self.minimum}, initial {self.initial} and maximum {self.maximum}; expected "
                f"rising numbers from {MIN_SCALE} to {MAX_SCALE:.0f}"
            )


class LossScale(nn.Cell):
    """The loss scale and its update; part of the compiled step.

    Attributes:
        value: factor of the loss.
        num_good: steps without overflow since the last change of the scale.
        num_skipped: total number of steps skipped because of an overflow.
        num_tolerated: with hysteresis, overflows since the last growth, at most `hysteresis`.
    """

    def __init__(self, config: LossScaleConfig):
        super().__init__(auto_prefix=False)
        self.value = state("loss_scale.value", config.initial)
        self.num_good = state("loss_scale.num_good", 0)
        self.num_skipped = state("loss_scale.num_skipped", 0)
        self.growth_interval = float(config.growth_interval)
        self.minimum, self.maximum = config.minimum, config.maximum
        self.hysteresis = float(config.hysteresis)
        if config.hysteresis > 1:
            self.num_tolerated = state("loss_scale.num_tolerated", 0)

    def construct(self, is_finite):
        """Updates the scale, given whether all gradients were finite (a bool scalar); returns a dependency."""
        good = is_finite.astype(ms.float32)
        num_good = (self.num_good + 1.0) * good
        grows = (num_good >= self.growth_interval).astype(ms.float32)
        falls = 1.0 - good
        moved = good
        if self.hysteresis > 1:
            num_tolerated = ops.minimum(self.num_tolerated + falls, Tensor(self.hysteresis, ms.float32))
            falls = falls * (num_tolerated >= self.hysteresis).astype(ms.float32)
            moved = ops.assign(self.num_tolerated, num_tolerated * (1.0 - grows))
        value = ops.clamp(self.value * (1.0 + grows - 0.5 * falls), self.minimum, self.maximum)
        moved = ops.depend(ops.assign(self.value, value), moved)
        counted = ops.assign(self.num_good, num_good * (1.0 - grows))
        skipped = ops.assign_add(self.num_skipped, 1.0 - good)
        return ops.depend(skipped, (moved, counted))

    @property
    def state(self) -> dict[str, Parameter]:
        """The state in a checkpoint, by name."""
        tolerated = (self.num_tolerated,) if self.hysteresis > 1 else ()
        return {parameter.name: parameter for parameter in (self.value, self.num_good, self.num_skipped, *tolerated)}


def state(name: str, value: float) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name=name, requires_grad=False)


class MeanLoss(nn.Cell):
    """*batch -> the mean of the token losses of the pass, and 1, so that all passes of a step weigh the same.

    A pass without labels returns 0 and 0: it is no part of the mean.

    Args:
        model: *batch -> sum of the token losses, number of labels.
    """

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *batch):
        return mean_loss(*self.model(*batch))


class ScaledLoss(nn.Cell):
    """(scale, *batch) -> the model's loss times the scale, the loss, the number of labels."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, scale, *batch):
        loss, num_labels = self.model(*batch)
        return loss * scale, loss, num_labels


def mean_loss(loss, num_labels):
    """Sum of the losses and number of labels, float32 scalars -> their mean, and 1; 0 and 0 without labels."""
    one = Tensor(1.0, ms.float32)
    return loss / ops.maximum(num_labels, one), ops.minimum(num_labels, one)
