"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mindvlm.errors import UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` when the block ends without an exception.

    The bytes go to a hidden file in the same folder, are flushed to the disk and renamed; whatever ends the block
    early, KeyboardInterrupt included, removes that file and leaves `path` as it was.

    Raises:
        UserError: the folder is missing or not writable, the path is a folder or a device, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise UserError unless a file could be created or replaced at `path`; creates nothing."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of the file to write")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file, renaming would replace it; give the name of the file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it or choose another output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable; choose another output")
