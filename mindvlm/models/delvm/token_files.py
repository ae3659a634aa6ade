"""Codes on disk as DeLVM's training reads them: NAME.bin, one JSON line per sentence, and its index NAME.bin.meta.

A line is `{"tokens": [...]}`. The index is a NumPy array (lines, 2) int64 without the ending .npy: the byte offset of a
line and its number of codes. A negative number -c means the code c, which is read but is no target.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.atomic import PendingFiles
from mindvlm.core.errors import UserError

ENDING, INDEX_ENDING = ".bin", ".meta"


class TokenFile:
    """Reads the lines of a mapped .bin in any order.

    Args:
        vocab_size: codes must be below.

    Attributes:
        offsets, lengths: byte offset and number of codes of each line, (lines,) int64.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit each other.
    """

    def __init__(self, path: str | Path, vocab_size: int):
        self.path, self.vocab_size = Path(path), vocab_size
        index = read_index(self.path)
        self.offsets, self.lengths = index[:, 0], index[:, 1]
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._check_end()

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns the codes of a line, (length,) int64, negative where the code is no target.

        Raises:
            UserError: the line is damaged, has another length than its index says, or a code is out of range.
        """
        start = self.offsets[number]
        end = self.offsets[number + 1] if number + 1 < len(self) else self.size
        where = f"{self.path}: line {number + 1}"
        line = self._bytes[start:end]
        try:
            if not line.endswith(b"\n"):
                raise ValueError
            codes = json.loads(line)["tokens"]
            if not isinstance(codes, list) or not all(type(code) is int for code in codes):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{where} (byte {start}) is no {{'tokens': [...]}} of whole numbers; {self._remedy()}"
            ) from None
        if len(codes) != self.lengths[number]:
            raise UserError(
                f"{where} has {len(codes)} codes, but {self.path.name}{INDEX_ENDING} says {self.lengths[number]}; "
                f"{self._remedy()}"
            )
        wrong = next((code for code in codes if abs(code) >= self.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"{where} has the code {wrong}; expected {1 - self.vocab_size} to {self.vocab_size - 1}, as the VQGAN "
                "has them; encode the pictures with the VQGAN of this model"
            )
        return np.array(codes, np.int64)

    def _check_end(self) -> None:
        """Raises UserError unless the last indexed line is the last one of the file, and complete."""
        last = int(self.offsets[-1])
        end = self._bytes.find(b"\n", last) + 1 if last < self.size else 0
        if not end:
            raise UserError(
                f"{self.path}: is truncated: it has {self.size} bytes, which end before or within line {len(self)} of "
                f"its index (byte {last}); {self._remedy()}"
            )
        if end < self.size:
            raise UserError(
                f"{self.path}: has {self.size - end} bytes after line {len(self)}, the last one of "
                f"{self.path.name}{INDEX_ENDING}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        return "copy both files again from one source, or write them again"


def read_index(path: Path) -> np.ndarray:
    """Returns the index (lines, 2) int64 of a .bin. Raises UserError if it is missing, empty or damaged."""
    index_file = path.with_name(path.name + INDEX_ENDING)
    if not index_file.is_file():
        raise UserError(f"{index_file}: no such file; {path.name} cannot be read without its index beside it")
    try:
        index = np.load(index_file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{index_file}: is no NumPy array ({reason}); copy or write it again") from None
    if not isinstance(index, np.ndarray) or index.ndim != 2 or index.shape[1] != 2 or index.dtype.kind not in "iu":
        found = f"{index.dtype} {list(index.shape)}" if isinstance(index, np.ndarray) else "an archive"
        raise UserError(f"{index_file}: holds {found}; expected whole numbers of shape [lines, 2]")
    if not len(index):
        raise UserError(f"{index_file}: holds no lines; leave {path.name} out")
    index = index.astype(np.int64)
    if index[0, 0] < 0 or (np.diff(index[:, 0]) <= 0).any() or (index[:, 1] < 0).any():
        raise UserError(f"{index_file}: its offsets do not increase, or a length is negative; copy or write it again")
    return index


def write_token_file(path: str | Path, lines: Iterable[Sequence[int]]) -> int:
    """Writes a .bin and its index, which appear when both are complete, and returns the number of lines.

    Raises:
        UserError: the name has another ending, a line has no codes, there are no lines, or the disk refuses.
    """
    path = Path(path)
    if path.suffix != ENDING:
        raise UserError(f"{path}: files of codes end in {ENDING}; choose another name")
    index, end = [], 0
    try:
        with PendingFiles() as files:
            with files.create(path) as file:
                for codes in lines:
                    if not len(codes):
                        raise UserError(f"{path}: line {len(index) + 1} would have no codes; leave it out")
                    index.append((end, len(codes)))
                    end += file.write(json.dumps({"tokens": list(map(int, codes))}).encode() + b"\n")
            if not index:
                raise UserError(f"{path}: there are no lines to write; nothing was kept")
            with files.create(path.with_name(path.name + INDEX_ENDING)) as file:
                np.save(file, np.array(index, np.int64))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was kept") from error
    return len(index)


def join_lines(lines: Iterable[Sequence[int]], count: int) -> Iterator[list[int]]:
    """Yields sentences of `count` consecutive lines each; the last one may be shorter."""
    rest = iter(lines)
    while group := list(islice(rest, count)):
        yield [code for line in group for code in line]


def find_token_files(folder: str | Path) -> list[Path]:
    """Returns the .bin files below a folder, those of a folder before those of its subfolders, each by name.

    Raises:
        UserError: the folder does not exist or holds none.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of the files of codes, NAME{ENDING}")
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [Path(root) / name for name in sorted(files) if name.endswith(ENDING)]
    if not found:
        raise UserError(f"{folder}: holds no files of codes, NAME{ENDING}; give a folder with some")
    return found


def lines_by_task(folder: Path, min_length: int) -> dict[str, list[tuple[Path, int]]]:
    """Returns task -> file and number of each line that is long enough. The files of a folder are a task.

    Raises:
        UserError: there are no files, an index cannot be used, or no line is long enough.
    """
    tasks: dict[str, list[tuple[Path, int]]] = {}
    for path in find_token_files(folder):
        task = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
        numbers = np.flatnonzero(read_index(path)[:, 1] >= min_length).tolist()
        if numbers:
            tasks.setdefault(task, []).extend((path, number) for number in numbers)
    if not tasks:
        raise UserError(f"{folder}: holds no sentence of {min_length} codes or more; give others")
    return tasks
