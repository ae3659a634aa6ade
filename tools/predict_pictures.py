"""`mindvlm-predict` for a model that generates pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mindvlm.checkpoint import atomic_file, check_writable
from mindvlm.core.errors import UserError
from mindvlm.processing.code_processor import find_pairs, labelled_grid
from mindvlm.processing.images.sources import local_path
from mindvlm.tools import cli

FRAME_MILLISECONDS = 200


def predict_pictures(model, images: Sequence[str], arguments: argparse.Namespace, options: dict) -> int:
    """Writes the pictures that the model generates; returns the exit status.

    Raises:
        UserError: the options do not fit each other, a picture cannot be read, or a file cannot be written.
    """
    if not images:
        raise UserError("no picture given; add --image_dir FILE")
    if arguments.num_frames is not None:
        if arguments.prompt_pairs or arguments.grid:
            raise UserError("--num_frames continues a video; leave --prompt_pairs and --grid out")
        return predict_frames(model, images, arguments, options)
    if not arguments.prompt_pairs:
        raise UserError("the model generates pictures; add --prompt_pairs FOLDER with examples, or --num_frames")
    pairs = find_pairs(arguments.prompt_pairs)
    targets = dict(zip(images, output_files(images, arguments.output), strict=True))
    readable = [image for image in images if len(images) == 1 or is_readable(model, image)]
    results = model.complete(readable, pairs, **options) if readable else []
    for image, result in zip(readable, results, strict=True):
        target = targets[image]
        write_picture(target, grid_of(model, pairs, image, result) if arguments.grid else result)
        print(f"{image}: {target}")
    seconds = model.engine.runner.seconds
    cli.say(", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in ("compile", "vision", "prefill", "decode")))
    if len(readable) < len(images):
        cli.say(f"{len(images) - len(readable)} of {len(images)} pictures failed")
    return 0 if len(readable) == len(images) else 1


def is_readable(model, image: str) -> bool:
    """Encodes a picture, which the model keeps for the prediction; prints the error of a bad one."""
    try:
        model.encode([image])
    except UserError as error:
        cli.say(f"error: {error}")
        return False
    return True


def predict_frames(model, images: Sequence[str], arguments: argparse.Namespace, options: dict) -> int:
    """Writes the frames that follow a video as PNGs, and all of them as a GIF; returns the exit status."""
    folder = output_folder(arguments.output or "frames")
    frames = model.continue_pictures(images, arguments.num_frames, **options)
    for number, frame in enumerate(frames):
        write_picture(folder / f"{number:06d}.png", frame)
    given = [model.processor.squared(image) for image in images]
    with atomic_file(folder / "video.gif") as file:
        first, *others = (*given, *frames)
        first.save(file, "GIF", save_all=True, append_images=others, duration=FRAME_MILLISECONDS, loop=0)
    print(f"{len(frames)} frames: {folder}")
    return 0


def output_files(images: Sequence[str], output: str | None) -> list[Path]:
    """Returns the file to write for each picture: `output`, or NAME_prediction.png in the folder `output`.

    Raises:
        UserError: two results would have one name, or `output` names one file for several.
    """
    if output and Path(output).suffix and not Path(output).is_dir():
        if len(images) > 1:
            raise UserError(f"--output {output}: is one file but there are {len(images)} pictures; give a folder")
        if Path(output).suffix.lower() != ".png":
            raise UserError(f"--output {output}: results are PNG files; end the name with .png, or give a folder")
        check_writable(output)
        return [Path(output)]
    stems = [Path(local_path(image) or "picture").stem for image in images]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise UserError(f"two pictures have the name {twice}; rename one, or predict them one by one")
    folder = output_folder(output or ".")
    return [folder / f"{stem}_prediction.png" for stem in stems]


def output_folder(output: str) -> Path:
    """Returns the folder `output`, which is created. Raises UserError if that is impossible."""
    folder = Path(output)
    if folder.suffix and not folder.is_dir():
        raise UserError(f"--output {output}: expected a folder; give a name without an ending")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output}: no folder can be created there ({error.strerror}); choose another"
        ) from None
    check_writable(folder / "x")
    return folder


def grid_of(model, pairs: Sequence[tuple[Path, Path]], query: str, result: Image.Image) -> Image.Image:
    """Returns the pairs, the query and its result as one labelled picture."""
    squared = model.processor.squared
    rows = [
        [(f"example {number}", squared(picture)), (f"label {number}", squared(label))]
        for number, (picture, label) in enumerate(pairs, 1)
    ]
    return labelled_grid([*rows, [("query", squared(query)), ("prediction", result)]])


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG, which appears when it is complete."""
    with atomic_file(path) as file:
        picture.save(file, "PNG")
