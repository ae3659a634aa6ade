"""The checkpoints of a run: folders `step-N`, which appear when they are complete, and their removal."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from mindvlm.checkpoint import atomic_file
from mindvlm.core.errors import UserError

WEIGHTS_FILE, TRAINED_FILE, OPTIMIZER_FILE, STATE_FILE, BEST_FILE = (
    "weights.safetensors",
    "trained.safetensors",
    "optimizer.safetensors",
    "state.json",
    "best.json",
)
_NAME = re.compile(r"step-(\d{1,12})")
_HIDDEN = re.compile(r"\.step-\d{1,12}\.\d+\.(partial|obsolete)")


class RunCheckpoints:
    """The checkpoints in the output folder of a run.

    Args:
        folder: created if missing.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock: TextIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {folder}: cannot be created ({error.strerror}); choose another") from None

    def lock(self) -> None:
        """Locks the folder against training by other processes; the lock ends with the process.

        Raises:
            UserError: another process holds the lock.
        """
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise UserError(f"output_dir {self.folder}: another process trains into it; choose another") from None
        except OSError:
            # the file system has no locks
            pass

    def unlock(self) -> None:
        """Releases the lock if this process holds it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        found = []
        for entry in self.folder.iterdir():
            match = _NAME.fullmatch(entry.name)
            if match and (entry / STATE_FILE).is_file():
                found.append(int(match[1]))
        return sorted(found)

    def path(self, step: int) -> Path:
        """Returns the path of the checkpoint of a step, whether it exists or not."""
        return self.folder / f"step-{step}"

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def write(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Writes the checkpoint of a step: `fill` writes to a hidden folder, which is then renamed.

        If writing is interrupted, the folder contains only earlier checkpoints.

        Raises:
            UserError: a file cannot be written, for example on a full disk.
        """
        target = self.path(step)
        hidden = self._hidden(target, "partial")
        try:
            self._remove_leftovers()
            hidden.mkdir()
            fill(hidden)
            sync_folder(hidden)
            if target.exists():
                os.replace(target, self._hidden(target, "obsolete"))
            os.replace(hidden, target)
            sync_folder(self.folder)
        except BaseException as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError | UserError):
                last = self.latest()
                kept = (
                    f"{last} is kept, and the same command resumes from it"
                    if last
                    else "there is no earlier checkpoint"
                )
                reason = error.strerror or error if isinstance(error, OSError) else error
                raise UserError(f"checkpoint of step {step}: {reason}; {kept}; free disk space first") from None
            raise
        self._remove_leftovers()
        return target

    def prune(self, num_kept: int, *, besides: int | None = None) -> None:
        """Removes all checkpoints except the newest `num_kept` and that of the step `besides`."""
        for step in self.steps()[:-num_kept]:
            if step != besides:
                obsolete = self._hidden(self.path(step), "obsolete")
                # a partly removed folder must not look like a checkpoint
                os.replace(self.path(step), obsolete)
                shutil.rmtree(obsolete, ignore_errors=True)

    def write_best(self, best: dict[str, Any]) -> None:
        """Writes the best checkpoint and its figures to best.json."""
        with atomic_file(self.folder / BEST_FILE) as file:
            file.write((json.dumps(best, indent=2) + "\n").encode())

    def _hidden(self, target: Path, kind: str) -> Path:
        return target.with_name(f".{target.name}.{os.getpid()}.{kind}")

    def _remove_leftovers(self) -> None:
        for entry in self.folder.iterdir():
            if _HIDDEN.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state that is not tensors."""
    with atomic_file(folder / STATE_FILE) as file:
        file.write((json.dumps(state, indent=1, ensure_ascii=False) + "\n").encode())


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the state that is not tensors. Raises UserError if the file is damaged."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove {folder} to resume from an earlier one") from None
    keys = {"step": int, "source": dict, "job": dict, "rng": list}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in keys.items()):
        raise UserError(f"{path}: is not the state of a training run; remove {folder} to resume from an earlier one")
    return state


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
