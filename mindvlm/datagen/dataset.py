"""Makes a folder of pictures and their annotations: in parallel, repeatable and resumable.

FOLDER/images/000/000123.png
FOLDER/annotations.json        records in the format "vary"; written when all pictures are there
FOLDER/registry.yaml           for `data.registry` of a training job
FOLDER/.job.json               the options that the pictures were made with
FOLDER/.annotations.partial    records made so far; removed at the end
"""

import json
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import yaml
from PIL import Image

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.config import read_yaml
from mindvlm.core.errors import UserError
from mindvlm.core.processes import ProcessPool
from mindvlm.processing.images.image_span import IMAGE_MARKER

IMAGE_FORMATS = {"png": {}, "jpg": {"quality": 92}}
AHEAD = 8
ANNOTATIONS = "annotations.json"

Item = TypeVar("Item")


@dataclass(frozen=True)
class MadeSample:
    """An RGB picture with a question and its answer; `more` are further questions and answers."""

    image: Image.Image
    question: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()


class Maker(Protocol):
    """Makes a sample from a random generator alone.

    Attributes:
        version: raised when the same generator gives another sample than before.
    """

    version: ClassVar[int]

    def make(self, rng: np.random.Generator) -> MadeSample: ...


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Returns a random item."""
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True)
class _Job:
    """Makes the samples of one folder; each worker process has its own.

    Attributes:
        kind: class of the maker.
        options: dataclass that `kind` takes.
    """

    kind: type[Maker]
    options: object
    folder: Path
    seed: int
    image_format: str

    def describe(self) -> dict:
        return {
            "kind": self.kind.__name__,
            "version": self.kind.version,
            "seed": self.seed,
            "image_format": self.image_format,
            "options": asdict(self.options),
        }

    def make(self, maker: Maker, number: int) -> dict:
        """Writes picture `number` and returns its record."""
        sample = maker.make(np.random.Generator(np.random.PCG64([self.seed, number])))
        name = f"images/{number // 1000:03d}/{number:06d}.{self.image_format}"
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        format = {"jpg": "JPEG", "png": "PNG"}[self.image_format]
        try:
            sample.image.save(partial, format, **IMAGE_FORMATS[self.image_format])
            os.replace(partial, path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}); finished pictures are kept"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        texts = [f"{IMAGE_MARKER}\n{sample.question}", sample.answer, *chain.from_iterable(sample.more)]
        turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
        return {"image": name, "conversations": turns}


def make_dataset(
    kind: type[Maker],
    options: object,
    folder: str | Path,
    *,
    num_images: int,
    seed: int,
    image_format: str = "png",
    num_workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Makes those of the pictures 0 to `num_images` - 1 that are missing and returns their number.

    Picture n depends on `kind`, `options`, `seed` and n alone. A later call may ask for more pictures.

    Args:
        kind: class of the maker, such as `PageMaker`; `options` is its dataclass.
        progress: called with the number of finished pictures whenever it changes.

    Raises:
        UserError: the folder holds pictures made with other options, or cannot be written; errors of the maker.
    """
    folder = Path(folder)
    job = _Job(kind, options, folder, seed, image_format)
    maker = kind(options)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another output") from None
    _check_description(folder, job.describe())
    _registry(folder)  # a registry that cannot be extended is an error before the work
    records = {n: record for n, record in _finished(folder).items() if n < num_images}
    missing = [number for number in range(num_images) if number not in records]
    progress(len(records))
    with open(folder / ".annotations.partial", "a", encoding="utf-8") as partial:
        for number, record in _make_all(job, maker, missing, num_workers):
            records[number] = record
            partial.write(json.dumps([number, record], ensure_ascii=False) + "\n")
            partial.flush()
            progress(len(records))
    lines = [json.dumps(records[number], ensure_ascii=False) for number in range(num_images)]
    write_file(folder / ANNOTATIONS, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    if (registry := _registry(folder)) is not None:
        write_file(folder / "registry.yaml", registry)
    (folder / ".annotations.partial").unlink()
    return len(missing)


def _check_description(folder: Path, description: dict) -> None:
    path = folder / ".job.json"
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: damaged; delete the folder or choose another output") from None
        before = {"version": 1, **known, **known.pop("options")}
        now = {**description, **description["options"]}
        differing = sorted(key for key in now if key != "options" and before.get(key) != now[key])
        if differing:
            key = differing[0]
            raise UserError(
                f"{folder} holds pictures made with {key} {before.get(key)!r}, not {now[key]!r}; "
                "delete it or choose another output"
            )
    elif any((folder / "images").iterdir()) or (folder / ANNOTATIONS).exists():
        raise UserError(f"{folder} holds other data; choose another output")
    write_file(path, json.dumps(description, ensure_ascii=False).encode())


def _finished(folder: Path) -> dict[int, dict]:
    """Returns the records of an earlier run whose pictures exist, by number."""
    records = {}
    annotations, partial = folder / ANNOTATIONS, folder / ".annotations.partial"
    if annotations.exists():
        records = dict(enumerate(json.loads(annotations.read_text(encoding="utf-8"))))
    if partial.exists():
        lines = partial.read_text(encoding="utf-8").split("\n")
        # a killed run leaves a last line without its end
        records |= dict(json.loads(line) for line in lines[:-1])
        write_file(partial, "".join(line + "\n" for line in lines[:-1]).encode())
    return {number: record for number, record in records.items() if (folder / record["image"]).is_file()}


def _make_all(job: _Job, maker: Maker, numbers: list[int], num_workers: int):
    """Yields (number, record) in order."""
    if num_workers < 2 or len(numbers) < 2:
        yield from ((number, job.make(maker, number)) for number in numbers)
        return
    pool = ProcessPool(min(num_workers, len(numbers)), _prepare, (job,), remedy="lower the number of workers")
    try:
        waiting: deque = deque()
        for number in numbers:
            waiting.append((number, pool.submit(_make_here, number)))
            if len(waiting) > AHEAD * num_workers:
                first, future = waiting.popleft()
                yield first, pool.result(future)
        for number, future in waiting:
            yield number, pool.result(future)
    finally:
        pool.close()


def _registry(folder: Path) -> bytes | None:
    """Returns the registry with the entry of the folder in place of an earlier one; None if it need not change."""
    path, name = folder / "registry.yaml", re.sub(r"\W+", "_", folder.resolve().name) or "made"
    entry = {"images": ".", "annotations": ANNOTATIONS, "format": "vary", "weight": 1.0}
    known = read_yaml(path).values() if path.exists() else ()
    if all(isinstance(other, dict) and other.get("annotations") == ANNOTATIONS for other in known):
        return _dump({name: entry})
    return extended_registry(path, name, entry)


def extended_registry(path: Path, name: str, entry: dict) -> bytes | None:
    """Returns the content of a registry with an entry for `name` below its other lines; None if it has one.

    Raises:
        UserError: the registry cannot be read, or cannot be extended by lines.
    """
    entries, known = (read_yaml(path), path.read_bytes()) if path.exists() else ({}, b"")
    if name in entries:
        return None
    extended = known + b"\n" * bool(known and not known.endswith(b"\n")) + _dump({name: entry})
    try:
        is_extended = yaml.safe_load(extended) == entries | {name: entry}
    except yaml.YAMLError:
        is_extended = False
    if not is_extended:
        raise UserError(f"{path}: an entry cannot be appended; write its data sets below each other in UTF-8")
    return extended


def _dump(entries: dict) -> bytes:
    return yaml.safe_dump(entries, allow_unicode=True, sort_keys=False).encode()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that appears when it is complete."""
    with atomic_file(path) as file:
        file.write(content)


_worker: tuple[_Job, Maker] | None = None


def _prepare(job: _Job) -> None:
    global _worker
    _worker = job, job.kind(job.options)


def _make_here(number: int) -> dict:
    job, maker = _worker
    return job.make(maker, number)
