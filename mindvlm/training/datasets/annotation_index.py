"""Random access to the records of annotation files of any size.

The first use of a file writes an index beside it (or into a folder). It takes 16 bytes a record, every reading process
maps it into memory, and a change in size or time of the annotation file replaces it.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.training.datasets.json_records import RecordPlace, find_records

logger = logging.getLogger(__name__)

PLACE = np.dtype([("start", "<u8"), ("length", "<u4"), ("line", "<u4")])
MAGIC = "mindvlm-annotation-index-1"
HEADER_BYTES = 256
BLOCK_RECORDS = 1 << 16
REPORT_SECONDS = 10.0


class AnnotationIndex:
    """The records of one annotation file by number; only the index is mapped into memory.

    Args:
        annotations: JSON list or JSON lines, see `find_records`.
        folder: of the index; by default that of the file, or the user's cache if it is not writable.

    Raises:
        UserError: the file is missing, has a syntax error (the message has its line) or no record, or no folder for
            the index is writable.
    """

    def __init__(
        self,
        annotations: str | Path,
        *,
        folder: str | Path | None = None,
    ):
        self.annotations = Path(annotations).resolve()
        if not self.annotations.is_file():
            raise UserError(f"annotation file {annotations}: not found; check the path")
        self._stamp = _stamp(self.annotations)
        candidates = _index_paths(self.annotations, folder)
        self.path = next((path for path in candidates if _is_current(path, self._stamp)), None)
        if self.path is None:
            self.path = _write_index(self.annotations, candidates, self._stamp)
        size = self.path.stat().st_size - HEADER_BYTES
        if size < PLACE.itemsize:
            raise UserError(f"annotation file {annotations}: has no records; remove the data set or fill it")
        self._places = np.memmap(self.path, dtype=PLACE, mode="r", offset=HEADER_BYTES)
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._places)

    def place(self, number: int) -> RecordPlace:
        """Returns the location of record `number`."""
        return RecordPlace(*(int(value) for value in self._places[number]))

    def read(self, number: int):
        """Returns record `number`, parsed.

        Raises:
            UserError: the record is not JSON or not UTF-8 (in a file of JSON lines), or the file has changed.
        """
        if self._file is None:
            self._file = os.open(self.annotations, os.O_RDONLY)
        place = self.place(number)
        try:
            # files joined to one may have a byte order mark at each joint
            return json.loads(os.pread(self._file, place.length, place.start).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if _stamp(self.annotations) != self._stamp:
                raise UserError(f"{self.annotations}: has changed since it was opened; start again") from None
            if isinstance(error, json.JSONDecodeError):
                problem = f"not JSON ({error.msg} at column {error.colno})"
            else:
                problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "brackets nested too deeply"
            raise UserError(f"{problem}; correct the line") from None

    def close(self) -> None:
        """Closes the annotation file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _stamp(path: Path) -> dict:
    status = path.stat()
    return {"magic": MAGIC, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _index_paths(annotations: Path, folder: str | Path | None) -> list[Path]:
    # annotation files with equal names may share the folder
    distinct = f"{annotations.name}.{hashlib.blake2b(os.fsencode(annotations), digest_size=8).hexdigest()}.index"
    if folder is not None:
        return [Path(folder) / distinct]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindvlm"
    return [annotations.with_name(f".{annotations.name}.index"), cache / distinct]


def _is_current(path: Path, stamp: dict) -> bool:
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
        whole = (path.stat().st_size - HEADER_BYTES) % PLACE.itemsize == 0
    except (OSError, ValueError):
        return False
    return whole and header == stamp


def _write_index(annotations: Path, candidates: list[Path], stamp: dict) -> Path:
    path = next((path for path in candidates if _can_write(path)), None)
    if path is None:
        raise UserError(
            f"annotation file {annotations}: no place for its index ({', '.join(str(p.parent) for p in candidates)} "
            "cannot be written); set data.index_folder"
        )
    header = json.dumps(stamp).ljust(HEADER_BYTES - 1) + "\n"
    with atomic_file(path) as file:
        file.write(header.encode())
        for block in _blocks(find_records(annotations), annotations, stamp["size"]):
            file.write(block)
    return path


def _can_write(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path.parent, os.W_OK | os.X_OK)


def _blocks(places: Iterator[RecordPlace], annotations: Path, num_bytes: int) -> Iterator[bytes]:
    reported = time.monotonic()
    num_records = 0
    while block := list(islice(places, BLOCK_RECORDS)):
        num_records += len(block)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            logger.info(f"indexing {annotations.name}: {num_records} records, {100 * block[-1].start // num_bytes} %")
        yield np.array(block, dtype=PLACE).tobytes()
