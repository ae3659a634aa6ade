"""The files of made data, written so that a killed run resumes.

FOLDER/TASK/NAME.png                            pictures
FOLDER/vision/TASK/train.bin, train.bin.meta    their codes; the original program reads folders named `vision`
FOLDER/vision/TASK/items.jsonl                  the items in train.bin, in order, with the lengths of their groups
FOLDER/vision/TASK/.codes.partial               codes so far, a line of name, tab and groups for each item; removed
                                                at the end
.job.json in FOLDER and FOLDER/vision           the options that the data are made with
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.items import Group, Item
from mindvlm.models.delvm.token_files import TokenFile, join_lines, write_token_file


def keep_description(folder: Path, description: dict) -> None:
    """Writes the options that a folder is made with. Raises UserError if it was made with others."""
    path = folder / ".job.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        is_empty = not any(entry.name != ".job.json" for entry in folder.iterdir())
    except ValueError:
        raise UserError(f"{path}: damaged; delete the folder or choose another output") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another output") from None
    if known is None and not is_empty:
        raise UserError(f"{folder}: holds other data; choose another output")
    known = known if isinstance(known, dict) else description
    key = next((key for key in description if known.get(key) != description[key]), None)
    if key:
        raise UserError(
            f"{folder}: was made with {key} {known.get(key)!r}, not {description[key]!r}; delete it or choose another "
            "output"
        )
    with atomic_file(path) as file:
        file.write(json.dumps(description).encode())


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); finished items are kept, the same command resumes"
    )


class PictureFolder:
    """The pictures of a task as PNG files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, item: Item) -> bool:
        return all(self._path(name).exists() for names in item.groups for name in names)

    def add(self, item: Item, groups: Sequence[Group]) -> None:
        """Writes the pictures of an item. Raises UserError if the disk refuses."""
        partial = self.folder / ".partial"
        try:
            for names, group in zip(item.groups, groups, strict=True):
                for name, picture in zip(names, group, strict=True):
                    self._path(name).parent.mkdir(parents=True, exist_ok=True)
                    picture.save(partial, "PNG")
                    os.replace(partial, self._path(name))
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"


class CodeFile:
    """The codes of a task, kept until all items are there and then written as sentences.

    Args:
        path: the .bin to write; its folder is made.
        vocab_size: codes are below.
        num_codes: of a picture.

    Raises:
        UserError: the folder cannot be written, or the files of an earlier run are damaged.
    """

    def __init__(self, path: Path, vocab_size: int, num_codes: int):
        self.path, self.vocab_size, self.num_codes = path, vocab_size, num_codes
        self.partial, self.record = path.with_name(".codes.partial"), path.with_name("items.jsonl")
        self._places: dict[str, int] = {}
        # codes of each item
        self._sizes: dict[str, int] = {}
        self._file = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.is_finished = not self.partial.exists() and path.exists() and self.record.exists()
            if self.is_finished:
                recorded = self._recorded()
                self._places = {name: number for number, (name, _) in enumerate(recorded)}
                self._sizes = {name: sum(lengths) for name, lengths in recorded}
            else:
                self._open()
        except OSError as error:
            raise cannot_write(path, error) from None

    def has(self, item: Item) -> bool:
        """Returns whether all pictures of an item have codes; a clip may have gained frames since an earlier run."""
        return self._sizes.get(item.name) == self.num_codes * sum(map(len, item.groups))

    def add(self, item: Item, rows: Sequence[Sequence[int]]) -> None:
        """Keeps the codes of the groups of an item. Raises UserError if the disk refuses."""
        try:
            if self.is_finished:
                self._reopen()
            self._places[item.name] = self._file.seek(0, os.SEEK_END)
            self._sizes[item.name] = sum(map(len, rows))
            self._file.write(_line(item.name, rows))
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def finish(self, items: Iterable[Item], groups_per_line: int) -> None:
        """Writes the sentences of the items that have codes, in the order of `items`.

        Raises:
            UserError: no item has codes, or the disk refuses.
        """
        names = [item.name for item in items if self.has(item)]
        if self.is_finished and names == list(self._places):
            return
        try:
            if self.is_finished:
                self._reopen()
            lengths: list[list[int]] = []
            write_token_file(self.path, join_lines(self._groups(names, lengths), groups_per_line))
            with atomic_file(self.record) as file:
                for name, numbers in zip(names, lengths, strict=True):
                    file.write(json.dumps({"item": name, "codes": numbers}).encode() + b"\n")
            self._file.close()
            self.partial.unlink()
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def _groups(self, names: Sequence[str], lengths: list[list[int]]) -> Iterator[list[int]]:
        """Yields the codes of each group, and adds the numbers of codes of each item to `lengths`."""
        for name in names:
            self._file.seek(self._places[name])
            rows = json.loads(self._file.readline().partition(b"\t")[2])
            lengths.append([len(row) for row in rows])
            yield from rows

    def _open(self) -> None:
        """Opens the codes so far, and drops an incomplete last line, which a killed run leaves."""
        self._file = open(self.partial, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.partial}: another process writes it; wait for it or choose another output"
            ) from None
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            name, tab, rows = line.partition(b"\t")
            if not tab or not name.startswith(b'"'):
                raise UserError(f"{self.partial}: damaged; delete it, the same command makes it again")
            # a later line of the same item replaces the earlier one
            self._places[json.loads(name)] = end
            self._sizes[json.loads(name)] = rows.count(b",") + 1
            end += len(line)
        self._file.truncate(end)

    def _reopen(self) -> None:
        """Takes the codes out of the finished file, so that others can be added."""
        lines, recorded = TokenFile(self.path, self.vocab_size), self._recorded()
        if lines.lengths.sum() != sum(sum(lengths) for _, lengths in recorded):
            raise self._damaged()
        codes = (code for line in lines for code in line.tolist())
        with atomic_file(self.partial) as file:
            for name, lengths in recorded:
                file.write(_line(name, [[next(codes) for _ in range(length)] for length in lengths]))
        self.is_finished, self._places, self._sizes = False, {}, {}
        self._open()

    def _recorded(self) -> list[tuple[str, list[int]]]:
        try:
            records = [json.loads(line) for line in self.record.read_text(encoding="utf-8").splitlines()]
            return [(str(record["item"]), list(map(int, record["codes"]))) for record in records]
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None

    def _damaged(self) -> UserError:
        return UserError(
            f"{self.record}: damaged or of another {self.path.name}; delete {self.path.parent}, the same command makes "
            "it again"
        )


def _line(name: str, rows: Sequence[Sequence[int]]) -> bytes:
    return f"{json.dumps(name)}\t{json.dumps([list(row) for row in rows])}\n".encode()
