"""The files of a download: those of folders, and those in tar files and LMDB folders without unpacking."""

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.samples.public_data import Unusable, read_text

PICTURE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
DATABASE, DATABASE_LIST = "data.mdb", "meta_info.txt"


class Entry(NamedTuple):
    """A file of a download.

    Attributes:
        name: its place without the ending, with "/" between folders; a tar file counts as a folder.
        suffix: its ending in lower case, with the point.
        read: returns its bytes, or raises `Unusable`. Threads may call it.
    """

    name: str
    suffix: str
    read: Callable[[], bytes]

    @property
    def is_picture(self) -> bool:
        return self.suffix in PICTURE_SUFFIXES


def find_entries(sources: Sequence[str]) -> list[Entry]:
    """Returns the files of folders and tar files, those of a folder by name, those of a tar file in its order.

    With several sources, their names come first in those of the files. Hidden files are left out.

    Raises:
        UserError: a source does not exist or cannot be read, or a tar file is damaged, truncated or compressed.
    """
    found = []
    for source in map(Path, sources):
        start = f"{os.path.basename(os.path.abspath(source)).removesuffix('.tar')}/" if len(sources) > 1 else ""
        if source.suffix == ".tar":
            found += _members(source, start)
        elif source.is_dir():
            found += _below(source, start)
        else:
            raise UserError(f"--source {source}: is neither a folder nor a .tar file; check the path")
    return found


def open_picture(read: Callable[[], bytes]) -> Image.Image:
    """Returns the picture of a file. Raises Unusable if it cannot be read."""
    try:
        return load_image(read())
    except UserError:
        raise Unusable("a picture cannot be read") from None


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Returns a key by which numbers in names are compared as numbers."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _below(folder: Path, start: str) -> Iterator[Entry]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        place = start + "".join(f"{part}/" for part in Path(root).relative_to(folder).parts)
        if DATABASE in files:
            folders.clear()
            yield from _records(Path(root), place)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(root, name)
            if path.suffix == ".tar":
                yield from _members(path, f"{place}{path.stem}/")
            else:
                yield _entry(place + name, partial(_read_part, path))


def _members(path: Path, start: str) -> Iterator[Entry]:
    try:
        # compressed files could only be read from the start
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and parts and not parts[-1].startswith("."):
                    if member.issparse() or ".." in parts or parts[0] == "/":
                        raise UserError(f"{path}: holds {member.name!r}, a sparse file or one outside; pack it again")
                    read = partial(_read_part, path, member.offset_data, member.size)
                    yield _entry(start + "/".join(parts), read)
            end = archive.offset
        # tarfile takes a damaged header, or none, for the end
        if _read_part(path, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"its end is missing at byte {end}")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path}: is truncated or no uncompressed tar file ({error}); download it again, or unpack it into a folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def _records(folder: Path, start: str) -> Iterator[Entry]:
    """Yields the pictures of an LMDB as BasicSR writes it: `NAME.png (h,w,channels) level` lists the key NAME."""
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{folder}: an LMDB, which needs the package lmdb; run: pip install lmdb") from None
    listed = folder / DATABASE_LIST
    lines = read_text(listed).splitlines()
    try:
        database = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{folder}: is no readable LMDB ({error}); copy it again") from None
    for line in filter(None, map(str.strip, lines)):
        file = line.split(" ")[0]
        key = os.path.splitext(file)[0]
        yield _entry(start + file, partial(_read_record, database, key.encode()))


def _read_record(database: Any, key: bytes) -> bytes:
    with database.begin() as transaction:
        content = transaction.get(key)
    if content is None:
        raise Unusable("a key of meta_info.txt is not in the LMDB")
    return content


def _read_part(path: Path, start: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError:
        raise Unusable("a file cannot be read") from None


def _entry(place: str, read: Callable[[], bytes]) -> Entry:
    name, suffix = os.path.splitext(place)
    return Entry(name, suffix.lower(), read)
