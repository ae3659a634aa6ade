"""`delvm-pairs`: damaged pictures and the clean ones of the same name, as of deraining and deblurring."""

import argparse
import re
from functools import partial

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.alignment import WHOLE, Source
from mindvlm.models.delvm.made_data.downloads import Download, add_source, made_from
from mindvlm.models.delvm.made_data.files import Entry, find_entries, open_picture
from mindvlm.models.delvm.made_data.items import Group
from mindvlm.models.delvm.made_data.making import SKIPPED
from mindvlm.processing.code_processor import LABEL, PICTURE

RESERVED = ("vision", SKIPPED)
"""Names of the folder of codes and of the list of skipped pictures."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--folders",
        nargs=2,
        default=["input", "target"],
        metavar=("PICTURES", "LABELS"),
        help="names of the folders, or LMDBs, of pictures and labels anywhere below the source (default input target)",
    )
    parser.add_argument("--task", default="pairs", metavar="NAME", help="of the folder of the results (default pairs)")


def find_sources(arguments: argparse.Namespace) -> list[Source]:
    """Returns each picture with the label of the same place and name below the other folder.

    Raises:
        UserError: the folders or the task have no proper names, there are no such folders, or a picture has no partner
            or two.
    """
    if not re.fullmatch(r"\w[\w.-]*", arguments.task) or arguments.task in RESERVED:
        raise UserError(
            f"--task is {arguments.task!r}; expected a name of letters, digits, '_', '-' and '.', but not "
            f"{' or '.join(RESERVED)}"
        )
    if len(set(arguments.folders)) < 2:
        raise UserError(
            f"--folders names {arguments.folders[0]!r} twice; give the folder of pictures and that of labels"
        )
    sides: tuple[dict[str, Entry], dict[str, Entry]] = {}, {}
    for entry in filter(lambda entry: entry.is_picture, find_entries(arguments.source)):
        parts = entry.name.split("/")
        for folder, side in zip(arguments.folders, sides, strict=True):
            if folder in parts[:-1]:
                place = parts[:-1].index(folder)
                name = "/".join((*parts[:place], *parts[place + 1 :]))
                if side.setdefault(name, entry) is not entry:
                    raise UserError(f"--source: two pictures are named {entry.name}; remove one of them")
    pictures, labels = sides
    if not (pictures or labels):
        names = " and ".join(map(repr, arguments.folders))
        raise UserError(
            f"--source {' '.join(arguments.source)}: holds no pictures below folders named {names}; correct --source "
            "or --folders"
        )
    alone = sorted(pictures.keys() ^ labels.keys())
    if alone:
        here, there = arguments.folders if alone[0] in pictures else reversed(arguments.folders)
        raise UserError(
            f"--source: {alone[0]} is in {here}, but not in {there} ({len(alone)} of {len(pictures | labels)} have no "
            "partner); add or remove them, or correct --folders"
        )
    return [Source(name, (PICTURE, LABEL), partial(load, pictures[name], labels[name])) for name in pictures]


def load(picture: Entry, label: Entry) -> Group:
    return open_picture(picture.read), open_picture(label.read)


PAIRS = made_from(
    Download(
        title="pairs of pictures and labels from two folders or LMDBs",
        description="Reads pairs of pictures of the same name from two folders, or from two LMDBs as BasicSR writes "
        "them. Rain13K: --source Rain13K; GoPro: --source GoPro/train --folders blur sharp; "
        "LMDBs: --source datasets --folders rain13k_input.lmdb rain13k_target.lmdb.",
        add_options=add_options,
        find_sources=find_sources,
        cut=WHOLE,
        unit="pairs",
        per_line=4,
    )
)
