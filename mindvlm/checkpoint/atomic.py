"""Writes files that appear under their final names only when all of them are complete."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mindvlm.core.errors import UserError


@contextmanager
def atomic_file(path: str | Path, remedy: str = "nothing was kept") -> Iterator[BinaryIO]:
    """Opens a binary file for writing that replaces `path` when the block ends without an exception.

    The bytes go to a hidden file in the same folder, which is flushed to disk and renamed. Any exception, also
    KeyboardInterrupt, removes that file and leaves `path` unchanged.

    Args:
        remedy: end of the message about a full disk.

    Raises:
        UserError: the folder is missing or not writable, the path is a folder or a device, or the disk is full.
    """
    path = Path(path)
    try:
        check_writable(path)
        remove_stale_files(path.parent, re.compile(re.escape(path.name)))
        with PendingFiles() as files, files.create(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


class PendingFiles:
    """Files of one folder that appear together when the `with` block ends without an exception, or not at all.

    Each is written under a hidden name, `.NAME.PID.partial`. At the end they are renamed in the order of their
    creation; a failure or interrupt between two renames restores the previous files. Only a killed process leaves
    hidden files; the next process that writes the same names removes them.
    """

    def __init__(self) -> None:
        self._partial: dict[Path, Path] = {}
        self._obsolete: list[Path] = []

    @contextmanager
    def create(self, path: Path) -> Iterator[BinaryIO]:
        """Opens the hidden file of `path` for writing; its bytes are on disk when the block ends.

        Raises:
            UserError: `path` cannot be created or replaced.
            OSError: the disk is full.
        """
        check_writable(path)
        self._partial[path] = _hidden(path, "partial")
        with open(self._partial[path], "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def adopt(self, path: Path, made: Path) -> None:
        """Renames `made`, a complete file on the same disk, to `path` at the end."""
        check_writable(path)
        self._partial[path] = made

    def remove(self, paths: Iterable[Path]) -> None:
        """Removes these files when the new ones appear."""
        self._obsolete.extend(paths)

    def __enter__(self) -> PendingFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            if kind is None:
                self._commit()
        finally:
            for partial in self._partial.values():
                partial.unlink(missing_ok=True)

    def _commit(self) -> None:
        if len(self._partial) == 1 and not self._obsolete:
            ((path, partial),) = self._partial.items()
            os.replace(partial, path)
            return
        replaced = [path for path in (*self._partial, *self._obsolete) if path.exists()]
        earlier = {path: _hidden(path, "earlier") for path in replaced}
        try:
            for path, aside in earlier.items():
                os.replace(path, aside)
            for path, partial in self._partial.items():
                os.replace(partial, path)
        except BaseException:
            for path, partial in self._partial.items():
                if not partial.exists():
                    path.unlink(missing_ok=True)
            for path, aside in earlier.items():
                if aside.exists():
                    os.replace(aside, path)
            raise
        for aside in earlier.values():
            aside.unlink(missing_ok=True)


@contextmanager
def staging_folder(beside: Path) -> Iterator[Path]:
    """Makes a hidden folder on the same disk as `beside`, a future file or folder, and removes it at the end.

    Files can be written and inspected there before `PendingFiles.adopt` publishes them. A folder that a killed process
    left for the same name is removed first.

    Raises:
        UserError: the folder cannot be created.
    """
    parent = existing_folder(beside.parent)
    for entry in parent.glob(f".{glob.escape(beside.name)}.*.staging"):
        number = entry.name.split(".")[-2]
        if number.isdecimal() and not _runs_elsewhere(int(number)) and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
    folder = _hidden(parent / beside.name, "staging")
    try:
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{beside}: cannot be written ({error.strerror}); choose another output") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def output_folder(folder: Path, output: str | Path) -> Iterator[None]:
    """Removes `folder` after an error inside the block if it did not exist before.

    Raises:
        UserError: in place of an OSError; `output` is the name in the message.
    """
    is_new = False
    try:
        is_new = not folder.exists()
        yield
    except BaseException as error:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{output}: cannot be written ({error.strerror or error}); nothing was kept") from error
        raise


def remove_stale_files(folder: Path, names: re.Pattern[str]) -> None:
    """Removes the hidden files that a killed process left in `folder` for files whose full names match `names`.

    Files of a running process stay. Those with the ID of this process are stale: another process had the ID before (in
    a container, every run may have the same).
    """
    for entry in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.(\d{1,9})\.(partial|earlier)", entry.name)
        if match and names.fullmatch(match[1]) and not _runs_elsewhere(int(match[2])):
            with suppress(OSError):
                entry.unlink()


def check_writable(path: str | Path) -> None:
    """Raises UserError unless a file could be created or replaced at `path`; creates nothing."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of the file to write")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file, which a rename would replace; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it or choose another output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable; choose another output")


def existing_folder(folder: Path) -> Path:
    """Returns `folder`, or the nearest folder above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.is_dir() or place == place.parent)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
