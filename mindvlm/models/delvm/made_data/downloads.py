"""Kinds of made data from a download: their common options, and from sources to pictures and codes."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.alignment import Cut, Source, squares_of
from mindvlm.models.delvm.made_data.making import SIZES, Maker, Progress, add_vqgan, check_range, open_encoder
from mindvlm.processing.samples.made_data import MadeData

SIZE = 256
MOST_COPIES = 1000


@dataclass(frozen=True, kw_only=True)
class Download:
    """Pictures of a download that become training data.

    Attributes:
        title: what they are.
        description: text of the help.
        add_options: adds the options of the download; one is `--source`, a list.
        find_sources: returns the pictures of the download; called with the parsed options.
        cut: how pictures are divided.
        unit: what `--UNIT_per_line` counts.
        per_line: its default.
        task: name of the task's folder; if None, the option `--task` names it.
        sources_are_lines: whether a source is a sentence itself; otherwise `UNIT_per_line` groups are joined.
    """

    title: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    find_sources: Callable[[argparse.Namespace], Sequence[Source]]
    cut: Cut
    unit: str
    per_line: int
    task: str | None = None
    sources_are_lines: bool = False


def made_from(kind: Download) -> MadeData:
    """Returns the kind for `mindvlm-make-data`."""
    return MadeData(
        f"{kind.title}, as pictures and as codes",
        f"{kind.description} The results are codes in vision/TASK/train.bin (--vqgan), PNG files in TASK (--pictures), "
        "or both. Pictures that cannot be used are listed in skipped.txt. The same command resumes an interrupted run "
        "and adds new pictures of the download.",
        partial(add_options, kind),
        partial(make, kind),
    )


def add_options(kind: Download, parser: argparse.ArgumentParser) -> None:
    kind.add_options(parser)
    add_vqgan(parser, kind.unit, kind.per_line)
    parser.add_argument("--pictures", action="store_true", help="write the squares as PNG files")
    parser.add_argument("--size", type=int, help=f"edge of a square in pixels (default: of the VQGAN, else {SIZE})")
    parser.add_argument(
        "--augment",
        type=int,
        default=0,
        metavar="N",
        help="add N copies of each square: a random part, mirrored or turned; the same for a picture and its label",
    )
    parser.add_argument("--num_items", type=int, metavar="N", help="take the first N of the download (default: all)")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds `--source`."""
    parser.add_argument(
        "--source", type=os.path.expanduser, nargs="+", required=True, metavar="FOLDER|TAR", help="the download"
    )


def make(kind: Download, arguments: argparse.Namespace, progress: Progress) -> list[str]:
    """Makes the pictures and codes that are missing. Returns the lines that say what was made and skipped.

    Raises:
        UserError: an option is out of range, the download is missing or damaged, nothing of it can be used, the folder
            holds other data or cannot be written, or the VQGAN cannot be used.
    """
    per_line = f"{kind.unit}_per_line"
    for name, least, most in ((per_line, 1 + kind.sources_are_lines, 10**6), ("augment", 0, MOST_COPIES)):
        check_range(arguments, name, least, most)
    for name, least, most in (("size", *SIZES), ("num_items", 1, 10**12)):
        if getattr(arguments, name) is not None:
            check_range(arguments, name, least, most)
    if not (arguments.vqgan or arguments.pictures):
        raise UserError("nothing to write: give --vqgan FOLDER for codes, --pictures for PNG files, or both")
    output = Path(os.path.realpath(arguments.output))
    for source in arguments.source:
        # the results would be pictures of the download in the next run
        if output.is_relative_to(os.path.realpath(source)):
            raise UserError(f"--output {arguments.output}: lies in --source {source}; choose a folder outside")
    sources = kind.find_sources(arguments)[: arguments.num_items]
    if not sources:
        raise UserError(f"--source {' '.join(arguments.source)}: holds no {kind.title}; check the path")
    encoder = open_encoder(arguments)
    size = arguments.size or (encoder.size if encoder else SIZE)
    description = {"seed": arguments.seed, "size": size, "augment": arguments.augment}
    description["source"] = [os.path.realpath(source) for source in arguments.source]
    if kind.sources_are_lines:
        description[per_line] = getattr(arguments, per_line)
    maker = Maker(
        arguments,
        description,
        encoder=encoder,
        unit=kind.unit,
        noun=f"lines of {kind.unit}" if kind.sources_are_lines else kind.unit,
        groups_per_line=1 if kind.sources_are_lines else getattr(arguments, per_line),
        keeps_pictures=arguments.pictures,
    )
    items = squares_of(sources, kind.cut, size=size, num_copies=arguments.augment, seed=arguments.seed)
    return maker.make({kind.task or arguments.task: items}, progress)
