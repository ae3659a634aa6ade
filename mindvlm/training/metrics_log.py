"""Metrics of a run as JSON lines and, on request, as TensorBoard event files."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import atomic_file
from mindvlm.core.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class MetricsLog:
    """Appends records to `metrics.jsonl` in the folder of a run.

    Args:
        folder: folder of the run.
        step: step from which the run resumes; later records of an interrupted run are dropped.
        tensorboard: also write event files.

    Raises:
        UserError: the file cannot be written, or tensorboardX is not installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False):
        self.path = folder / METRICS_FILE
        drop_after(self.path, step)
        self.events = EventFiles(folder / EVENTS_FOLDER, step=step) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        """Writes one record; numbers keep all digits."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free disk space and start again"
            ) from None
        if self.events:
            self.events.add(step, {key: value for key, value in values.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Flushes all events to their file."""
        if self.events:
            self.events.close()


def drop_after(path: Path, step: int) -> None:
    """Removes the records of later steps, left by an interrupted run. Raises UserError if it is not a metrics file."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        with atomic_file(path) as file:
            # the output of a model may contain half of a surrogate pair
            file.write(text.encode(errors="backslashreplace"))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics file. A kill may have cut off the last line.

    Raises:
        UserError: the file is missing, or is not a metrics file.
    """
    path, remedy = Path(path), f"give the output_dir of a run, or its {METRICS_FILE}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: is not a record with a step; move the file away")
        records.append(record)
    return records


class EventFiles:
    """Writes event files for TensorBoard (and SwanLab's `swanlab convert`) with the package tensorboardX.

    Args:
        folder: folder of the files.
        step: step from which the run resumes; TensorBoard hides later steps of earlier files.

    Raises:
        UserError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, *, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard is true but tensorboardX is not installed; run: pip install tensorboardX"
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes one scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes all events to their file."""
        self.writer.close()


class Progress:
    """Measures speed and remaining time, and formats progress lines.

    Args:
        total_steps: number of steps of the run.
        clock: returns monotonic seconds.
    """

    def __init__(self, total_steps: int, *, clock: Callable[[], float] = time.perf_counter):
        self.total_steps = total_steps
        self.clock = clock
        self.started: float | None = None
        self.seconds = 0.0
        self.num_steps = 0
        self.num_tokens = 0

    def start_step(self) -> None:
        """Marks the start of a step."""
        self.started = self.clock()

    def end_step(self, num_tokens: int, *, is_counted: bool) -> float:
        """Marks the end of a step and returns its seconds. A step that compiled does not count for the speed."""
        seconds = self.clock() - self.started
        if is_counted:
            self.seconds += seconds
            self.num_steps += 1
            self.num_tokens += num_tokens
        return seconds

    @property
    def speed(self) -> dict[str, float]:
        """Returns tokens per second and seconds per step since the last `restart`; empty before the first step."""
        if not self.num_steps or self.seconds <= 0:
            return {}
        return {
            "tokens_per_second": round(self.num_tokens / self.seconds, 1),
            "seconds_per_step": round(self.seconds / self.num_steps, 4),
        }

    def restart(self) -> None:
        """Resets the counters for the next line."""
        self.seconds, self.num_steps, self.num_tokens = 0.0, 0, 0

    def line(self, step: int, figures: Mapping[str, float]) -> str:
        """Formats `step 50/7300 | loss 3.2146 | lr 1.50e-03 | ... | 1:02:03 left`."""
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
    """Formats a figure for the progress line."""
    if name in FORMATS:
        return FORMATS[name].format(value)
    return f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"


def duration(seconds: float) -> str:
    """Formats seconds as `1:02:03` or `2 d 1:02:03`."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
