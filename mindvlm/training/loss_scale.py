"""Dynamic loss scale for float16 (Micikevicius et al., arXiv 1710.03740)."""

from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.core.errors import UserError

# what is scaled is the sum of the token losses, so that a large step may need less than 1
MIN_SCALE, MAX_SCALE = 2.0**-16, 2.0**24


@dataclass(kw_only=True)
class LossScaleConfig:
    """How the scale moves: halved when a gradient overflows, doubled after `growth_interval` steps without."""

    initial: float = 2.0**16
    growth_interval: int = 2000

    def __post_init__(self):
        if not 1 <= self.initial <= MAX_SCALE or self.growth_interval < 1:
            raise UserError(
                f"loss_scale: initial is {self.initial} and growth_interval {self.growth_interval}; expected 1 to "
                f"{MAX_SCALE:.0f} and at least 1"
            )


class LossScale(nn.Cell):
    """The scale and its movement; part of the compiled step.

    Attributes:
        value: what the loss is multiplied by.
        num_good: steps without overflow since the scale last moved.
        num_skipped: steps that were left out because of an overflow, since the beginning.
    """

    def __init__(self, config: LossScaleConfig):
        super().__init__(auto_prefix=False)
        self.value = state("loss_scale.value", config.initial)
        self.num_good = state("loss_scale.num_good", 0)
        self.num_skipped = state("loss_scale.num_skipped", 0)
        self.growth_interval = float(config.growth_interval)

    def construct(self, is_finite):
        """Notes whether all gradients of a step were finite (a bool scalar); returns something to depend on."""
        good = is_finite.astype(ms.float32)
        num_good = (self.num_good + 1.0) * good
        grows = (num_good >= self.growth_interval).astype(ms.float32)
        factor = good * (1.0 + grows) + (1.0 - good) * 0.5
        value = ops.clamp(self.value * factor, MIN_SCALE, MAX_SCALE)
        moved = ops.assign(self.value, value)
        counted = ops.assign(self.num_good, num_good * (1.0 - grows))
        skipped = ops.assign_add(self.num_skipped, 1.0 - good)
        return ops.depend(skipped, (moved, counted))

    @property
    def state(self) -> dict[str, Parameter]:
        """What a checkpoint keeps, by name."""
        return {parameter.name: parameter for parameter in (self.value, self.num_good, self.num_skipped)}


def state(name: str, value: float) -> Parameter:
    return Parameter(Tensor(value, ms.float32), name=name, requires_grad=False)
