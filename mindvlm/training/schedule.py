"""Learning rate by step."""

import math
from dataclasses import dataclass

from mindvlm.errors import UserError


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, a plateau, and a cosine descent over the last `decay_steps` to `final_ratio` of the peak."""

    total_steps: int
    warmup_steps: int = 100
    decay_steps: int = 0
    final_ratio: float = 0.0

    def __post_init__(self):
        if self.total_steps < 1 or self.warmup_steps < 0 or self.decay_steps < 0:
            raise UserError(
                f"schedule: total_steps {self.total_steps}, warmup_steps {self.warmup_steps}, decay_steps "
                f"{self.decay_steps}; expected at least 1, 0 and 0"
            )
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise UserError(
                f"schedule: warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} exceed total_steps "
                f"{self.total_steps}; shorten them"
            )

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at `step` (the first is 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.total_steps - step
        if left >= self.decay_steps:
            return 1.0
        progress = 1 - max(left, 0) / self.decay_steps
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
