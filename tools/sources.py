"""The pictures and documents that arguments name: files, folders, URLs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.processing.images.sources import IMAGE_ENDINGS, local_path
from mindvlm.tools import cli
from mindvlm.tools.download import download, is_web_address, name_of

READ_ENDINGS = IMAGE_ENDINGS | {".pdf"}
OTHER_ENDINGS = {
    *(".ai", ".arw", ".cr2", ".cr3", ".djvu", ".dng", ".doc", ".docx", ".eps", ".epub", ".nef", ".odp", ".odt"),
    *(".ppt", ".pptx", ".ps", ".raf", ".svg", ".xps"),
}
"""Documents and camera files that a folder may hold and that are not read."""


@dataclass(frozen=True)
class Source:
    """A picture or a document.

    Attributes:
        name: as given, or the path of a file in a folder.
        file: path to open, or a data URL.
        text_name: its name, or its path in a folder that was given; texts are named after it.
    """

    name: str
    file: str
    text_name: Path


def find_sources(paths: Sequence[str], *, recursive: bool = False, downloads: Path | None = None) -> list[Source]:
    """Returns the pictures and documents: files and URLs as given, those of folders in name order.

    Documents and camera files that are not read, and folders in a folder, are named on standard error.

    Args:
        recursive: whether folders in folders are searched.
        downloads: folder for the content of http and https URLs; None refuses them.

    Raises:
        UserError: a path does not exist, a URL is refused or fails, or a folder holds nothing that is read.
    """
    sources = []
    for argument in paths:
        if is_web_address(argument) and not os.path.lexists(argument):
            if downloads is None:
                raise UserError(f"image {argument}: a URL; download it first and give the file, or add --allow_urls")
            sources.append(Source(argument, str(download(argument, downloads)), Path(name_of(argument))))
            continue
        path = local_path(argument)
        if path is None:
            sources.append(Source(argument, argument, Path("page")))
        elif Path(path).is_dir():
            sources += sources_of_folder(Path(path), recursive)
        elif Path(path).exists():
            sources.append(Source(str(Path(path)), str(Path(path)), Path(Path(path).name)))
        else:
            raise UserError(f"{path} does not exist; give a picture, a document or a folder of them")
    return sources


def sources_of_folder(folder: Path, recursive: bool) -> list[Source]:
    """Returns the pictures and documents in a folder and names what it leaves out; see `find_sources`."""
    files = list(files_of(folder, recursive))
    read = [path for path in files if path.suffix.lower() in READ_ENDINGS]
    others = [str(path.relative_to(folder)) for path in files if path.suffix.lower() in OTHER_ENDINGS]
    folders = [] if recursive else [path.name for path in folder.iterdir() if path.is_dir()]
    inner = sorted(f"{name}/" for name in folders if not name.startswith("."))
    if not read:
        found = f" but {[*others, *inner][0]}" if others or inner else ""
        remedy = "add --recursive" if inner and not others else "convert to one of these, or give another"
        endings = ", ".join(sorted(READ_ENDINGS))
        raise UserError(f"folder {folder} holds no pictures{found} ({endings}); {remedy}")
    if others:
        cli.say(f"{folder}: left out {', '.join(others)}; convert to PNG or PDF to ask about them")
    if inner:
        cli.say(f"{folder}: left out {', '.join(inner)}; add --recursive to search folders in it")
    return [Source(str(path), str(path), path.relative_to(folder)) for path in read]


def files_of(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yields the files of a folder in the order of their names, then those of the folders in it."""
    for place, folders, names in os.walk(folder, onerror=leave_out):
        yield from (path for name in sorted(names) if (path := Path(place, name)).is_file())
        folders[:] = sorted(folders) if recursive else []


def leave_out(error: OSError) -> None:
    cli.say(f"{error.filename}: left out, it cannot be searched ({error.strerror}); check its permissions")
