"""The file of `mindvlm-predict --output`: a JSON line for each answer, on disk as soon as it is given.

The same command goes on after the last line. Errors, and answers about files that have changed since, are removed and
their pages asked about again.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import UserError
from mindvlm.evaluation.answers import end_last_line, is_finished
from mindvlm.tools.sources import place_of

Record = dict[str, Any]

GO_ON = "make room, and the same command goes on"
"""Remedy for a full disk."""


class AnswerLog:
    """Answers in a file, and those that are appended.

    Args:
        path: of the file, which may be missing.
        settings: keys of each record that must be equal, such as the query and the model.
        keys: those of the pages that are asked about, see `key_of`. Lines about other pages are kept.
        is_writer: whether lines are written. The file is then locked until `close`.

    Attributes:
        records: answers by the keys of their pages, which need not be asked about; see `is_valid`.

    Raises:
        UserError: the file cannot be read or written, is written by another process, holds other lines, or answers of
            other settings.
    """

    def __init__(self, path: str | Path, settings: Record, keys: Sequence[str], *, is_writer: bool = False):
        self.path, self.settings = Path(path), settings
        self.is_new = is_writer and not self.path.exists()
        self.locked: BinaryIO | None = locked_file(self.path) if is_writer else None
        self.order = {key: number for number, key in enumerate(keys)}
        self.records: dict[str, Record] = {}
        for where, record in self.lines() if self.path.exists() else ():
            self.check(where, record)
            if self.is_valid(record):
                self.records[key_of_record(record)] = record

    def is_valid(self, record: Record) -> bool:
        """Whether a record holds an answer, and its file is the same as then."""
        return "text" in record and record.get("file") == stamp(places_of(record))

    def lines(self) -> Iterator[tuple[str, Record]]:
        """Yields the place and the record of each line but an unfinished last one."""
        try:
            *lines, rest = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); choose another output") from None
        lines += [rest] if is_finished(rest) else []
        for number, line in enumerate(lines, 1):
            where = f"{self.path}: line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not {"image", "query"} <= record.keys():
                raise UserError(f"{where} is no answer of mindvlm-predict; choose another output, or remove the file")
            yield where, record

    def check(self, where: str, record: Record) -> None:
        """Raises UserError if a record was made with other settings."""
        for key, expected in self.settings.items():
            found = record.get(key, expected)
            if found == expected:
                continue
            if isinstance(found, dict) and isinstance(expected, dict):
                inner = next(name for name in found | expected if found.get(name) != expected.get(name))
                key, found, expected = inner, found.get(inner, "default"), expected.get(inner, "default")
            raise UserError(
                f"{where} was made with {key} {found!r}, not {expected!r}; choose another output, or the same options"
            )

    def start(self) -> None:
        """Makes the file ready for new lines: ends the last one, and removes those that are asked about again."""
        if not self.path.exists():
            return
        records = [record for _, record in self.lines()]
        kept = [record for record in records if key_of_record(record) not in self.order or self.is_valid(record)]
        if len(kept) < len(records):
            self.write(kept)
        else:
            end_last_line(self.path)

    def append(self, record: Record) -> None:
        """Adds a line, which is on disk when this returns. Raises UserError if it cannot be written."""
        if "text" in record:
            self.records[key_of_record(record)] = record
        try:
            with open(self.path, "ab") as file:
                file.write(line_of(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); {GO_ON}") from None

    def sort(self) -> None:
        """Puts the lines into the order of the pages, in case that several were answered together."""
        records = [record for _, record in self.lines()]
        ordered = sorted(records, key=lambda record: self.order.get(key_of_record(record), -1))
        if ordered != records:
            self.write(ordered)

    def write(self, records: Sequence[Record]) -> None:
        """Writes a file of these records in place of the present one."""
        with atomic_file(self.path, GO_ON) as file:
            # locked before it appears; the copied descriptor keeps the lock after `file` is closed
            copy = os.fdopen(os.dup(file.fileno()), "wb")
            lock(copy)
            for record in records:
                file.write(line_of(record))
        self.locked.close()
        self.locked = copy

    def close(self) -> None:
        """Unlocks the file, and removes it if it is new and empty."""
        if self.locked is None:
            return
        if self.is_new and os.fstat(self.locked.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self.locked.close()
        self.locked = None


def locked_file(path: Path) -> BinaryIO:
    """Opens and locks a file, which is made if it is missing.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    while True:
        try:
            file = open(path, "ab")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output") from None
        try:
            lock(file)
            # another process may have replaced or removed the file before it was locked
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            raise UserError(f"{path}: another process writes it; wait for it or choose another output") from None
        file.close()


def lock(file: BinaryIO) -> None:
    """Locks a file until it is closed. Raises BlockingIOError if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # the file system has no locks
        pass


def check_log(path: str | Path) -> None:
    """Raises UserError unless lines can be appended to a file."""
    check_writable(path)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"{path}: not writable; choose another output")


def line_of(record: Record) -> bytes:
    # a byte of a file name that is not text becomes a JSON escape
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def key_of(place: str | list[str] | None, page: int | list[int | None] | None) -> str:
    """Returns what identifies a page of a document, or those of a joint question.

    Args:
        place: of the document, see `mindvlm.tools.sources.place_of`.
        page: its number; None for a document of one page.
    """
    return json.dumps([place, page])


def key_of_record(record: Record) -> str:
    return key_of(places_of(record), record.get("page"))


def places_of(record: Record) -> str | list[str] | None:
    """Returns the places of the documents of a record.

    A file is looked for at the path that was recorded, which holds in every working folder, then at its name, in case
    that it was moved together with the answers.
    """
    names, paths = record["image"], record.get("path")
    if not isinstance(names, list):
        return names and place_of(paths if is_file(paths) else str(names))
    paths = paths if isinstance(paths, list) and len(paths) == len(names) else names
    return [place_of(path if is_file(path) else str(name)) for name, path in zip(names, paths, strict=True)]


def is_file(path: Any) -> bool:
    return isinstance(path, str) and os.path.exists(path)


def stamp(place: str | list[str] | None) -> Record | list | None:
    """Returns size and time of change of a file, a list for several pictures; None for what is no file."""
    if isinstance(place, list):
        return [stamp(one) for one in place]
    try:
        status = os.stat(place or "")
    except (OSError, ValueError):
        return None
    return {"bytes": status.st_size, "modified": status.st_mtime}
