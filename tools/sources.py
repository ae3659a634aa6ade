"""The pictures and documents that arguments name: files, folders, URLs."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.downloads import download
from mindvlm.processing.images.sources import IMAGE_ENDINGS, local_path, short_name
from mindvlm.tools import cli

MAX_DOWNLOAD_BYTES = 2**30
MAX_DOWNLOAD_SECONDS = 3600
READ_ENDINGS = IMAGE_ENDINGS | {".pdf"}
OTHER_ENDINGS = {
    *(".ai", ".arw", ".cr2", ".cr3", ".djvu", ".dng", ".doc", ".docx", ".eps", ".epub", ".nef", ".odp", ".odt"),
    *(".ppt", ".pptx", ".ps", ".raf", ".svg", ".xps"),
}
"""Documents and camera files that a folder may hold and that are not read."""
NUM_NAMED = 5
"""Files with other endings that a message names; it counts the rest."""


@dataclass(frozen=True)
class Source:
    """A picture or a document. Two are equal if they are one document, however it was named, with one name of its text.

    Attributes:
        name: as given, or the path of a file in a folder.
        file: path to open, or a data URL.
        text_name: its name, or its path in a folder that was given; texts are named after it.
        place: what identifies it, see `place_of`.
    """

    name: str = field(compare=False)
    file: str = field(compare=False)
    text_name: Path
    place: str


def place_of(name: str) -> str:
    """Returns what identifies a document: the resolved path of a file, otherwise its name, such as a URL."""
    return os.path.realpath(name) if os.path.exists(name) else name


def find_sources(paths: Sequence[str], *, recursive: bool = False, downloads: Path | None = None) -> list[Source]:
    """Returns the pictures and documents: files and URLs as given, those of folders in name order.

    Files that are not read, except hidden ones, and folders that are not searched are named on standard error.

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
                raise UserError(
                    f"image {short_name(argument)}: a URL; download it first and give the file, or add --allow_urls"
                )
            sources.append(Source(argument, str(downloaded(argument, downloads)), Path(name_of(argument)), argument))
            continue
        path = local_path(argument)
        if path is None:
            sources.append(Source(argument, argument, Path("page"), argument))
        elif Path(path).is_dir():
            sources += sources_of_folder(Path(path), recursive)
        elif Path(path).exists():
            sources.append(source_of_file(Path(path), Path(Path(path).name)))
        else:
            raise UserError(f"{short_name(path)} does not exist; give a picture, a document or a folder of them")
    return sources


def is_web_address(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def name_of(url: str) -> str:
    """Returns the file name in a URL."""
    path = re.sub(r"[^:]*://[^/?#]*|[?#].*", "", url, flags=re.DOTALL)
    return Path(unquote(path)).name.replace("\0", "").strip(".") or "page"


def downloaded(url: str, folder: Path) -> Path:
    """Writes the content of a URL to a new file in a folder and returns its path. Raises UserError, see `download`."""
    path = folder / f"{len(list(folder.iterdir()))}_{name_of(url)[-50:]}"
    with open(path, "wb") as file:
        limits = {"max_bytes": MAX_DOWNLOAD_BYTES, "seconds": MAX_DOWNLOAD_SECONDS}
        download(url, file, hosts=None, **limits, allow_private=True)
    return path


def sources_of_folder(folder: Path, recursive: bool) -> list[Source]:
    """Returns the pictures and documents in a folder and names what it leaves out; see `find_sources`."""
    files, inner, links = search(folder, recursive)
    read = [path for path in files if path.suffix.lower() in READ_ENDINGS]
    others = [path for path in files if path.suffix.lower() in OTHER_ENDINGS]
    known = READ_ENDINGS | OTHER_ENDINGS
    unknown = [path for path in files if path.suffix.lower() not in known and not path.name.startswith(".")]
    left_out = {
        "convert to PNG or PDF to ask about them": [str(path.relative_to(folder)) for path in others],
        "add --recursive to search folders in it": [f"{path.relative_to(folder)}/" for path in inner],
        "give them as well (links to folders are not followed)": [f"{path.relative_to(folder)}/" for path in links],
    }
    left_out = {remedy: names for remedy, names in left_out.items() if names}
    if not read:
        found = f" but {next(iter(left_out.values()))[0]}" if left_out else ""
        endings = ", ".join(sorted(READ_ENDINGS))
        remedy = next(iter(left_out), "give another")
        raise UserError(f"folder {folder} holds no pictures{found} ({endings}); {remedy}")
    for remedy, names in left_out.items():
        cli.say(f"{folder}: left out {', '.join(names)}; {remedy}")
    if unknown:
        names = [str(path.relative_to(folder)) for path in unknown[:NUM_NAMED]]
        if len(unknown) > NUM_NAMED:
            names.append(f"and {counted(len(unknown) - NUM_NAMED, 'other file')}")
        cli.say(f"{folder}: left out {', '.join(names)}; their endings are not those of pictures or PDFs")
    return [source_of_file(path, path.relative_to(folder)) for path in read]


def source_of_file(path: Path, text_name: Path) -> Source:
    return Source(str(path), str(path), text_name, place_of(str(path)))


def search(folder: Path, recursive: bool) -> tuple[list[Path], list[Path], list[Path]]:
    """Returns the files of a folder, the folders in it that are not searched, and links to folders.

    The files are in the order of their names, then those of the folders in it.
    """
    files, inner, links = [], [], []
    for place, folders, names in os.walk(folder, onerror=leave_out):
        try:
            files += [path for name in sorted(names) if (path := Path(place, name)).is_file()]
        except OSError as error:
            # a folder that can be listed but not entered
            error.filename = place
            leave_out(error)
        paths = [Path(place, name) for name in sorted(folders) if recursive or not name.startswith(".")]
        links += [path for path in paths if os.path.islink(path)]
        inner += [path for path in paths if not recursive and not os.path.islink(path)]
        folders[:] = sorted(folders) if recursive else []
    return files, inner, links


def leave_out(error: OSError) -> None:
    cli.say(f"{error.filename}: left out, it cannot be searched ({error.strerror}); check its permissions")
