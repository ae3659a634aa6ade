"""What a person sees of a run: one line every few steps."""

import time
from collections.abc import Callable, Mapping


class Progress:
    """Speed and time left.

    Args:
        total_steps: of the run.
        clock: seconds that only grow.
    """

    def __init__(self, total_steps: int, *, clock: Callable[[], float] = time.perf_counter):
        self.total_steps = total_steps
        self.clock = clock
        self.started: float | None = None
        self.seconds = 0.0
        self.num_steps = 0
        self.num_tokens = 0

    def start_step(self) -> None:
        """A step begins."""
        self.started = self.clock()

    def end_step(self, num_tokens: int, *, is_counted: bool) -> float:
        """It has ended; returns its seconds. One that compiled is not counted for the speed."""
        seconds = self.clock() - self.started
        if is_counted:
            self.seconds += seconds
            self.num_steps += 1
            self.num_tokens += num_tokens
        return seconds

    @property
    def speed(self) -> dict[str, float]:
        """Tokens and seconds since the last `restart`; empty before anything was counted."""
        if not self.num_steps or self.seconds <= 0:
            return {}
        return {
            "tokens_per_second": round(self.num_tokens / self.seconds, 1),
            "seconds_per_step": round(self.seconds / self.num_steps, 4),
        }

    def restart(self) -> None:
        """Forgets what was counted: the next line is about the steps to come."""
        self.seconds, self.num_steps, self.num_tokens = 0.0, 0, 0

    def line(self, step: int, figures: Mapping[str, float]) -> str:
        """`step 50/7300 | loss 3.2146 | lr 1.50e-03 | ... | 1:02:03 left`"""
        parts = [f"step {step}/{self.total_steps}"]
        parts += [describe(name, value) for name, value in figures.items()]
        seconds = self.speed.get("seconds_per_step")
        if seconds and step < self.total_steps:
            parts.append(f"{duration((self.total_steps - step) * seconds)} left")
        return " | ".join(parts)


FORMATS = {
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:.0f} tokens/s",
    "seconds_per_step": "{:.3g} s a step",
    "skipped": "{:.0f} samples skipped",
    "epoch": "epoch {:.2f}",
    "overflows": "{:.0f} overflows",
}


def describe(name: str, value: float) -> str:
    """A figure as the progress line shows it."""
    if name in FORMATS:
        return FORMATS[name].format(value)
    return f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"


def duration(seconds: float) -> str:
    """`1:02:03`, or `2 d 1:02:03`."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
