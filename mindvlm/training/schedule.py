"""Learning rate by step."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from mindvlm.core.errors import UserError


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up to the peak, a plateau if `decay_steps` leaves room for one, and decay to `final_ratio`.

    Attributes:
        total_steps: length of the training in optimizer steps; or
        epochs: its length in passes over the data.
        counts: what the schedule advances with: "steps", or "updates": not at a step whose gradients were not finite.
        idle_steps: steps with the rate 0 before the warm-up.
        warmup_steps: length of the warm-up, default 100; or
        warmup_ratio: its share of all steps.
        warmup_from_zero: the first step has the rate 0, as in transformers; otherwise the first rate above 0.
        decay: shape of the decay; "constant" stays at the peak.
        decay_steps: length of the decay; null starts it right after the warm-up.
        final_ratio: final rate as a share of the peak.
    """

    total_steps: int | None = None
    epochs: float | None = None
    counts: Literal["steps", "updates"] = "steps"
    idle_steps: int = 0
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    warmup_from_zero: bool = False
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    decay_steps: int | None = None
    final_ratio: float = 0.0

    def __post_init__(self):
        if (self.total_steps is None) == (self.epochs is None):
            raise UserError("schedule: give one of total_steps and epochs, and only one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise UserError("schedule: give one of warmup_steps and warmup_ratio, not both")
        least = {
            "total_steps": 1,
            "epochs": 1e-9,
            "idle_steps": 0,
            "warmup_steps": 0,
            "warmup_ratio": 0,
            "decay_steps": 0,
        }
        for key, lowest in {**least, "final_ratio": 0}.items():
            value = getattr(self, key)
            if value is not None and not lowest <= value < math.inf:
                raise UserError(
                    f"schedule.{key} is {value}; expected {'more than 0' if key == 'epochs' else f'at least {lowest}'}"
                )
        for key in ("warmup_ratio", "final_ratio"):
            if (getattr(self, key) or 0) > 1:
                raise UserError(f"schedule.{key} is {getattr(self, key)}; expected 0 to 1")
        if self.decay == "constant" and self.decay_steps:
            raise UserError("schedule.decay_steps has no effect with decay: constant; remove it")
        if self.total_steps is not None:
            parts = {"warmup_steps": self.num_warmup_steps, "decay_steps": self.decay_steps or 0}
            parts = {"idle_steps": self.idle_steps, **parts} if self.idle_steps else parts
            if sum(parts.values()) > self.total_steps:
                shown = " and ".join(f"{key} {value}" for key, value in parts.items())
                raise UserError(f"schedule: {shown} exceed total_steps {self.total_steps}; shorten them")

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up; the total length must be known."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * self.total_steps)
        return min(100, self.total_steps) if self.warmup_steps is None else self.warmup_steps

    def resolved(self, rows_per_epoch: int | None, rows_per_step: int) -> "ScheduleConfig":
        """Returns the same schedule with its length in steps.

        Args:
            rows_per_epoch: None for endless data.
            rows_per_step: over all devices.

        Raises:
            UserError: the length is in epochs, and the data are endless.
        """
        if self.epochs is None:
            return self
        if rows_per_epoch is None:
            raise UserError("schedule.epochs: rendered text has no end; set total_steps instead")
        steps = max(1, math.ceil(self.epochs * rows_per_epoch / rows_per_step))
        return dataclasses.replace(self, epochs=None, total_steps=steps)

    def factor(self, step: int) -> float:
        """Returns the share of the peak learning rate at `step` (from 0); the total length must be known."""
        idle, warmup = self.idle_steps, self.num_warmup_steps
        if step < idle:
            return 0.0
        if step < idle + warmup:
            return (step - idle + (not self.warmup_from_zero)) / warmup
        decay_steps = self.total_steps - idle - warmup if self.decay_steps is None else self.decay_steps
        left = self.total_steps - step
        if self.decay == "constant" or left >= decay_steps:
            return 1.0
        progress = 1 - max(left, 0) / decay_steps
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.final_ratio + (1 - self.final_ratio) * fall
