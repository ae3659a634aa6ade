"""Figures of a run as JSON lines and, where wanted, as TensorBoard event files."""

import json
import time
from pathlib import Path
from typing import Any, Protocol

from mindvlm.checkpoint import atomic_file
from mindvlm.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class EventWriter(Protocol):
    """What the writers of both packages are used for."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends records to `metrics.jsonl` in the folder of a run.

    Args:
        folder: of the run.
        step: where the run goes on; records of later steps, which an interrupted run left, are dropped.
        tensorboard: write event files too.

    Raises:
        UserError: the file cannot be written, or no package for event files is installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False):
        self.path = folder / METRICS_FILE
        drop_after(self.path, step)
        self.events = open_events(folder / EVENTS_FOLDER, step=step) if tensorboard else None

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
        with atomic_file(path) as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept).encode())


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


def open_events(folder: Path, *, step: int) -> EventWriter:
    """A writer of event files, which TensorBoard reads (and SwanLab's `swanlab convert`).

    Args:
        folder: of the files.
        step: where the run goes on; what an earlier file says about later steps is not shown.

    Raises:
        UserError: neither package is installed.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        pass
    else:
        return TensorboardXWriter(folder, step=step)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("tensorboard is true but no writer is installed; pip install tensorboardX") from None
    return TensorboardWriter(folder, step=step)


class TensorboardXWriter:
    """Event files by the package tensorboardX."""

    def __init__(self, folder: Path, *, step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class TensorboardWriter:
    """Event files by the package tensorboard."""

    def __init__(self, folder: Path, *, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        start = SessionLog(status=SessionLog.START)
        self.writer.add_event(Event(step=step + 1, wall_time=time.time(), session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One scalar for each value."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=scalars)))

    def close(self) -> None:
        self.writer.close()
