"""Prepares a public data set from a local download: records in LLaVA's layout, and their images in one tree.

ROOT/NAME.json        the records {id, image, conversations}; replaced when all are made
ROOT/registry.yaml    an entry for each prepared data set, for `data.registry` of a training job
ROOT/...              the images; hard links where the file system allows it, otherwise copies
"""

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from mindvlm.core.errors import UserError, counted
from mindvlm.datagen.dataset import extended_registry, write_file
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.samples.chat_samples import SPEAKERS
from mindvlm.processing.samples.public_data import Exchange, Item, PublicData, Unusable


@dataclass
class Prepared:
    """The result of a preparation.

    Attributes:
        num_items: items that were looked at.
        num_records: records written.
        skipped: reason -> ids of the items that cannot be used.
    """

    num_items: int
    num_records: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns a line for each reason, the most frequent one first."""
        by_count = sorted(self.skipped.items(), key=lambda entry: -len(entry[1]))
        return [
            f"skipped {counted(len(ids), 'item')}: {reason} (the first is {' '.join(ids[0].split())})"
            for reason, ids in by_count
        ]


def prepare(
    data: PublicData,
    name: str,
    download: str | Path,
    root: str | Path,
    *,
    seed: int = 1,
    num_records: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Writes the records of a data set and places their images.

    The records depend on the download, `seed` and `num_records` alone. A readable image in place is kept, so that an
    interrupted run resumes quickly.

    Args:
        data: the data set; `name` names its file of records and its entry of the registry.
        download: folder of the download.
        root: folder of the results, which may hold other data sets and may be the download.
        num_records: number of items to draw, at most; None takes that of `data`, 0 all.
        progress: called with the numbers of finished items and of all.

    Raises:
        UserError: a file of the download is missing or damaged, no item can be used, or `root` cannot be written or
            holds other records of that name.
    """
    download, root = Path(download), Path(root)
    _require(data, download)
    annotations, registry = root / f"{name}.json", root / "registry.yaml"
    _check_folder(root)
    entry = {"images": ".", "annotations": annotations.name, "format": "llava", "weight": 1.0}
    if extended_registry(registry, name, entry) is not None and annotations.exists():
        raise UserError(f"{annotations} exists, but {registry} does not list it; move it away or choose another output")
    try:
        items = list(data.read(download))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); download it again") from None
    limit = data.num_records or 0 if num_records is None else num_records
    if 0 < limit < len(items):
        chosen = random.Random(f"{seed} {name}").sample(range(len(items)), limit)
        items = [items[number] for number in sorted(chosen)]
    result = Prepared(len(items))
    records, placer = [], _Placer(download, root)
    for done, item in enumerate(items, start=1):
        try:
            exchange = data.exchange(item, random.Random(f"{seed} {name} {item.id}"))
            record = _record(name, item, exchange)
            if exchange.image is not None:
                placer.place(exchange.image, exchange.place)
            records.append(json.dumps(record, ensure_ascii=False))
        except Unusable as reason:
            result.skipped.setdefault(str(reason), []).append(item.id)
        progress(done, len(items))
    result.num_records = len(records)
    if not records:
        reasons = result.lines() or ["it holds none"]
        raise UserError(f"{download}: no item of {data.title} can be used; {reasons[0]}; is it the published download?")
    root.mkdir(parents=True, exist_ok=True)
    if (extended := extended_registry(registry, name, entry)) is not None:
        write_file(registry, extended)
    # a lone surrogate remains an escape of JSON
    write_file(annotations, ("[\n" + ",\n".join(records) + "\n]\n").encode(errors="backslashreplace"))
    return result


def _require(data: PublicData, download: Path) -> None:
    for path, description in data.needs.items():
        if not (download / path).exists():
            raise UserError(
                f"{download / path} not found: {data.title} needs {', '.join(data.needs)} in one folder; get {path} "
                f"({description}) from {data.page} and put it there, or correct --source"
            )


def _check_folder(root: Path) -> None:
    place = next(place for place in (root, *root.parents) if place.exists())
    if not place.is_dir():
        raise UserError(f"{root}: {place.name} is not a folder; choose another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{root}: the folder {place} is not writable; choose another output")


def _record(name: str, item: Item, exchange: Exchange) -> dict:
    texts = [text.replace(IMAGE_MARKER, "").strip() for text in exchange.texts]
    if len(texts) % 2:
        raise Unusable("the last question has no answer")
    if not all(texts):
        raise Unusable("a question or answer is empty")
    image = {} if exchange.image is None else {"image": exchange.place}
    if image:
        texts[0] = f"{IMAGE_MARKER}\n{texts[0]}"
    turns = [{"from": SPEAKERS[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": f"{name}-{item.id}", **image, "conversations": turns}


class _Placer:
    """Places images in the tree of the records, each once."""

    def __init__(self, download: Path, root: Path):
        self.download, self.root = download, root
        self.problems: dict[str, str] = {}

    def place(self, image: str, place: str) -> None:
        """Raises Unusable if the image is missing or cannot be read."""
        if place not in self.problems:
            self.problems[place] = self._problem(image, place)
        if self.problems[place]:
            raise Unusable(self.problems[place])

    def _problem(self, image: str, place: str) -> str:
        if any(PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts for path in (image, place)):
            return "the name of its image leads out of the folder"
        source, target = self.download / image, self.root / place
        if _is_image(target):
            return ""
        if not os.path.isfile(source):  # unlike Path.is_file, False for a name that is too long
            return "its image is missing"
        if not _is_image(source):
            return "its image cannot be read"
        try:
            _link(source, target)
        except OSError as error:
            problem = f"cannot be written ({error.strerror or error}); the images in place are kept"
            raise UserError(f"{target}: {problem}, the same command resumes") from None
        return ""


def _is_image(path: Path) -> bool:
    """Whether the path is a file that begins as an image does; PNG checksums are verified, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not path.is_file():  # opening a pipe would wait
                return False
            with Image.open(path) as image:
                image.verify()
            return True
        except Exception:  # Pillow may raise any exception for damaged files
            return False


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # one of a killed process with this ID may be a link to another image
    try:
        try:
            os.link(source.resolve(), partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
