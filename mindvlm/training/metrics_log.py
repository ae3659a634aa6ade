"""Figures of a run as JSON lines and, where wanted, as TensorBoard event files."""

import json
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
        folder: of the run.
        step: where the run goes on; records of later steps, which an interrupted run left, are dropped.
        tensorboard: write event files too.

    Raises:
        UserError: the file cannot be written, or tensorboardX is not installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False):
        self.path = folder / METRICS_FILE
        drop_after(self.path, step)
        self.events = EventFiles(folder / EVENTS_FOLDER, step=step) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        """One record; numbers keep all their digits."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room and start again") from None
        if self.events:
            self.events.add(step, {key: value for key, value in values.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Has all events in their file."""
        if self.events:
            self.events.close()


def drop_after(path: Path, step: int) -> None:
    """Removes the records of later steps, which an interrupted run left. Raises UserError if it is no such file."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        with atomic_file(path) as file:
            # what a model writes may be half of a surrogate pair
            file.write(text.encode(errors="backslashreplace"))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file. The last line may be cut off by a kill.

    Raises:
        UserError: the file is missing, or is no such file.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the {METRICS_FILE} of a run") from None
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
            raise UserError(f"{path}, line {number}: is no record with a step; move the file away")
        records.append(record)
    return records


class EventFiles:
    """Event files, which TensorBoard reads (and SwanLab's `swanlab convert`), by the package tensorboardX.

    Args:
        folder: of the files.
        step: where the run goes on; what an earlier file says about later steps is not shown.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, folder: Path, *, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("tensorboard is true but tensorboardX is not installed; pip install tensorboardX") from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Has all events in their file."""
        self.writer.close()
