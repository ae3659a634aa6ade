"""`mindvlm-make-data` for scenes: pairs of pictures, and their codes with a VQGAN.

FOLDER/TASK/000123_img.png, 000123_label.png
FOLDER/vision/TASK/train.bin, train.bin.meta    sentences of pairs; the original program reads folders named `vision`
FOLDER/vision/TASK/.codes.partial               codes of the pairs encoded so far; removed at the end
FOLDER/.job.json                                the options that the pairs were made with
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.scenes import TASKS, VERSION, draw_pair
from mindvlm.models.delvm.token_files import TokenFile, join_lines, write_token_file
from mindvlm.processing.code_processor import LABEL, PICTURE
from mindvlm.processing.samples.made_data import MadeData

SIZES = 16, 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=f"of {' '.join(TASKS)}"
    )
    parser.add_argument("--num_images", type=int, default=100, help="pairs of each task (default 100)")
    parser.add_argument("--size", type=int, default=256, help="edge of a picture in pixels (default 256)")
    parser.add_argument(
        "--vqgan", type=os.path.expanduser, metavar="FOLDER", help="also write the pairs as codes of this VQGAN"
    )
    parser.add_argument("--pairs_per_line", type=int, default=4, metavar="N", help="in a sentence of codes (default 4)")


def make_scenes(arguments: argparse.Namespace, progress: Callable[[int, int], None]) -> list[str]:
    """Makes the pairs and codes that are missing. Returns the lines that say what was made.

    Raises:
        UserError: an option is out of range, the folder holds other data or cannot be written, or the VQGAN cannot be
            used.
    """
    for name, least, most in (("num_images", 1, 10**6), ("size", *SIZES), ("pairs_per_line", 1, 10**6)):
        if not least <= getattr(arguments, name) <= most:
            raise UserError(f"--{name} is {getattr(arguments, name)}; expected {least} to {most}")
    folder, tasks = Path(arguments.output), list(dict.fromkeys(arguments.tasks))
    encoded = None
    if arguments.vqgan:
        # imported here: it imports MindSpore
        from mindvlm.models.delvm.picture_codes import open_vqgan

        # a VQGAN that cannot be used is an error before a folder is described with it
        encoded = open_vqgan(Path(arguments.vqgan))
    made = {"kind": arguments.kind, "version": VERSION, "seed": arguments.seed, "size": arguments.size}
    keep_description(folder, made)
    if encoded:
        by = {"vqgan": os.path.realpath(arguments.vqgan), "pairs_per_line": arguments.pairs_per_line}
        keep_description(folder / "vision", by)
    count, done, num_new = arguments.num_images, 0, 0
    total = count * len(tasks) * (2 if encoded else 1)
    for task in tasks:
        for number in range(count):
            num_new += write_pair(folder / task, task, number, arguments)
            progress(done := done + 1, total)
    lines = [f"made {num_new} of {count * len(tasks)} pairs of {len(tasks)} tasks in {folder}"]
    if encoded:
        for task in tasks:
            encode_task(folder, task, arguments, *encoded, lambda number, done=done: progress(done + number, total))
            done += count
        lines.append(f"codes: {folder / 'vision'}")
    return lines


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


def pair_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}{PICTURE}.png", folder / f"{number:06d}{LABEL}.png"


def write_pair(folder: Path, task: str, number: int, arguments: argparse.Namespace) -> bool:
    """Writes a pair unless it exists. Returns whether it was written."""
    paths = pair_paths(folder, number)
    if all(path.exists() for path in paths):
        return False
    partial = folder / ".partial"
    try:
        folder.mkdir(exist_ok=True)
        for path, picture in zip(paths, draw_pair(task, number, seed=arguments.seed, size=arguments.size), strict=True):
            picture.save(partial, "PNG")
            os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); finished pictures are kept"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return True


def encode_task(
    folder: Path,
    task: str,
    arguments: argparse.Namespace,
    encode: Callable[[Path], np.ndarray],
    vocab_size: int,
    progress: Callable[[int], None],
) -> None:
    """Writes the codes of the pairs of a task; those of an earlier run are kept."""
    target = folder / "vision" / task / "train.bin"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(".codes.partial")
    if partial.exists():
        # a killed run leaves a last line without its end
        pairs = [json.loads(line) for line in partial.read_text().split("\n")[:-1]]
    else:
        pairs = pairs_of(target, vocab_size, arguments.pairs_per_line) if target.exists() else []
    with atomic_file(partial) as file:
        file.write("".join(json.dumps(pair) + "\n" for pair in pairs).encode())
    with open(partial, "a") as file:
        for number in range(len(pairs), arguments.num_images):
            pairs.append([int(code) for path in pair_paths(folder / task, number) for code in encode(path)])
            file.write(json.dumps(pairs[-1]) + "\n")
            file.flush()
            progress(number + 1)
    write_token_file(target, join_lines(pairs[: arguments.num_images], arguments.pairs_per_line))
    partial.unlink()


def pairs_of(path: Path, vocab_size: int, pairs_per_line: int) -> list[list[int]]:
    """Returns the codes of the pairs in a finished file. A single shorter line may hold any number: none is kept."""
    lines = [line.tolist() for line in TokenFile(path, vocab_size)]
    if len(lines) < 2:
        return []
    length = len(lines[0]) // pairs_per_line
    codes = [code for line in lines for code in line]
    return [codes[start : start + length] for start in range(0, len(codes), length)]


MADE_DATA = {
    "scenes": MadeData(
        "drawn scenes of shapes with labels, as pairs of pictures and as codes",
        "Draws pairs TASK/NAME_img.png and NAME_label.png: scenes of shapes, and what each task makes of them. With a "
        "VQGAN, it also writes their codes to vision/TASK/train.bin. The same command resumes an interrupted run; a "
        "larger --num_images adds pairs.",
        add_options,
        make_scenes,
    )
}
