"""Tiny downloads in the layout of their authors, and the command that reads them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mindvlm.tools.make_data import main

COLOURS = [(250, 40, 40), (40, 250, 40), (40, 40, 250), (250, 250, 40)]


def png(colour, size=(40, 30), form="PNG") -> bytes:
    """Returns the bytes of a picture of one colour with a white corner."""
    image = Image.new("RGB", size, colour)
    image.paste((255, 255, 255), (0, 0, 9, 9))
    file = io.BytesIO()
    image.save(file, form, **({"quality": 95} if form == "JPEG" else {}))
    return file.getvalue()


def masks_json(size=(40, 30), first=300, **changes) -> bytes:
    """Returns the annotations of a picture as of SA-1B: a large mask of its first pixels, a small one within."""
    width, height = size
    counts = [0, first, width * height - first], [10, 20, width * height - 30]
    annotations = [{"segmentation": {"size": [height, width], "counts": list(runs)}} for runs in reversed(counts)]
    return json.dumps({"image": {}, "annotations": annotations, **changes}).encode()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_lmdb(folder: Path, files: dict[str, bytes], listed: list[str] | None = None) -> Path:
    """Writes an LMDB as BasicSR does; `listed` are the names in its list, those of the files by default."""
    import lmdb

    with lmdb.open(str(folder), map_size=2**20) as database, database.begin(write=True) as transaction:
        for name, content in files.items():
            transaction.put(name.removesuffix(".png").encode(), content)
    (folder / "lock.mdb").unlink()
    (folder / "meta_info.txt").write_text("".join(f"{name} (30,40,3) 1\n" for name in listed or files))
    return folder


def sa1b(names=("sa_1", "sa_2", "sa_10"), size=(40, 30)) -> dict[str, bytes]:
    files = {}
    for name, colour in zip(names, COLOURS, strict=False):
        files |= {f"{name}.jpg": png(colour, size, "JPEG"), f"{name}.json": masks_json(size)}
    return files


def run(kind: str, output: Path, *options) -> int:
    """Runs the command with squares of 16 pixels."""
    return main([f"delvm-{kind}", "--output", str(output), "--size", "16", *map(str, options)])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (16, 16)
        return np.asarray(image).astype(int)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
