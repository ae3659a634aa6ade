"""Makes a folder of pictures and their annotations: in parallel, repeatable, and where it stopped goes on.

FOLDER/images/000/000123.png
FOLDER/annotations.json        records in the format "vary"; appears when all pictures are there
FOLDER/registry.yaml           for `data.registry` of a training job
FOLDER/.job.json               what the pictures were made from
FOLDER/.annotations.partial    records so far, gone at the end
"""

import json
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.datagen.made import MadeSample
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.training.processes import ProcessPool

IMAGE_FORMATS = {"png": {}, "jpg": {"quality": 92}}
AHEAD = 8


class Maker(Protocol):
    """Makes a sample from a random generator."""

    def make(self, rng: np.random.Generator) -> MadeSample: ...


def make_dataset(
    kind: Callable[[object], Maker],
    options: object,
    folder: str | Path,
    *,
    num_images: int,
    seed: int,
    image_format: str = "png",
    num_workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Makes what is missing of the pictures 0 to `num_images` - 1 and returns how many that were.

    Picture n depends on `kind`, `options`, `seed` and n alone. More pictures may be asked for later.

    Args:
        kind: class of the maker, such as `PageMaker`; `options` is its dataclass.
        progress: takes the number of pictures that are there, whenever it changes.

    Raises:
        UserError: the folder holds pictures made in another way, or cannot be written; what the maker raises.
    """
    folder = Path(folder)
    description = {"kind": kind.__name__, "seed": seed, "image_format": image_format, "options": asdict(options)}
    maker = kind(options)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another output") from None
    _check_description(folder, description)
    records = {n: record for n, record in _finished(folder).items() if n < num_images}
    missing = [number for number in range(num_images) if number not in records]
    progress(len(records))
    with open(folder / ".annotations.partial", "a", encoding="utf-8") as partial:
        for number, record in _made(maker, kind, options, folder, seed, image_format, num_workers, missing):
            records[number] = record
            partial.write(json.dumps([number, record], ensure_ascii=False) + "\n")
            partial.flush()
            progress(len(records))
    _write(folder / "annotations.json", _json_list([records[number] for number in range(num_images)]))
    name = re.sub(r"\W+", "_", folder.resolve().name) or "made"
    entry = {name: {"images": ".", "annotations": "annotations.json", "format": "vary", "weight": 1.0}}
    _write(folder / "registry.yaml", yaml.safe_dump(entry, allow_unicode=True, sort_keys=False))
    (folder / ".annotations.partial").unlink()
    return len(missing)


def _check_description(folder: Path, description: dict) -> None:
    path = folder / ".job.json"
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: damaged; delete the folder or choose another output") from None
        before = {**known, **known.pop("options")}
        now = {**description, **description["options"]}
        differing = sorted(key for key in now if key != "options" and before.get(key) != now[key])
        if differing:
            key = differing[0]
            raise UserError(
                f"{folder} holds pictures made with {key} {before.get(key)!r}, not {now[key]!r}; "
                "delete it or choose another output"
            )
    elif any((folder / "images").iterdir()) or (folder / "annotations.json").exists():
        raise UserError(f"{folder} holds other data; choose another output")
    _write(path, json.dumps(description, ensure_ascii=False))


def _finished(folder: Path) -> dict[int, dict]:
    """Records of an earlier run whose pictures are there."""
    records = {}
    annotations, partial = folder / "annotations.json", folder / ".annotations.partial"
    if annotations.exists():
        records = dict(enumerate(json.loads(annotations.read_text(encoding="utf-8"))))
    if partial.exists():
        lines = partial.read_text(encoding="utf-8").split("\n")
        # a last line without its end was being written when the run was killed
        records |= dict(json.loads(line) for line in lines[:-1])
        _write(partial, "".join(line + "\n" for line in lines[:-1]))
    return {number: record for number, record in records.items() if (folder / record["image"]).is_file()}


def _made(maker, kind, options, folder, seed, image_format, num_workers, missing):
    """(number, record) of the missing pictures in order."""
    if num_workers < 2 or len(missing) < 2:
        yield from ((number, _make(maker, folder, seed, image_format, number)) for number in missing)
        return
    remedy = "lower the number of workers"
    pool = ProcessPool(
        min(num_workers, len(missing)), _prepare, (kind, options, folder, seed, image_format), remedy=remedy
    )
    try:
        waiting: deque = deque()
        for number in missing:
            waiting.append((number, pool.submit(_make_here, number)))
            if len(waiting) > AHEAD * num_workers:
                first, future = waiting.popleft()
                yield first, pool.result(future)
        for number, future in waiting:
            yield number, pool.result(future)
    finally:
        pool.close()


def _make(maker: Maker, folder: Path, seed: int, image_format: str, number: int) -> dict:
    sample = maker.make(np.random.Generator(np.random.PCG64([seed, number])))
    name = f"images/{number // 1000:03d}/{number:06d}.{image_format}"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        sample.image.save(partial, {"jpg": "JPEG", "png": "PNG"}[image_format], **IMAGE_FORMATS[image_format])
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); what is there is kept") from None
    finally:
        partial.unlink(missing_ok=True)
    turns = [
        {"from": "human", "value": f"{IMAGE_MARKER}\n{sample.question}"},
        {"from": "gpt", "value": sample.answer},
    ]
    return {"image": name, "conversations": turns}


def _json_list(records: list[dict]) -> str:
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


_job: tuple | None = None


def _prepare(kind: Callable[[object], Maker], options: object, folder: Path, seed: int, image_format: str) -> None:
    global _job
    _job = (kind(options), folder, seed, image_format)


def _make_here(number: int) -> dict:
    return _make(*_job, number)
