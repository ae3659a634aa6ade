"""`delvm-scenes`: drawn scenes of shapes with the labels of several tasks; they need no download."""

import argparse
from functools import partial

from mindvlm.models.delvm.made_data.items import Item, pair_of
from mindvlm.models.delvm.made_data.making import SIZES, Maker, Progress, add_vqgan, check_range, open_encoder
from mindvlm.models.delvm.scenes import TASKS, VERSION, Pair, draw_pair
from mindvlm.processing.samples.made_data import MadeData


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=f"of {' '.join(TASKS)}"
    )
    parser.add_argument("--num_images", type=int, default=100, help="pairs of each task (default 100)")
    parser.add_argument("--size", type=int, default=256, help="edge of a picture in pixels (default 256)")
    add_vqgan(parser, "pairs", 4)


def make_scenes(arguments: argparse.Namespace, progress: Progress) -> list[str]:
    """Makes the pairs and codes that are missing. Returns the lines that say what was made.

    Raises:
        UserError: an option is out of range, the folder holds other data or cannot be written, or the VQGAN cannot be
            used.
    """
    for name, least, most in (("num_images", 1, 10**6), ("size", *SIZES), ("pairs_per_line", 1, 10**6)):
        check_range(arguments, name, least, most)
    # a VQGAN that cannot be used is an error before a folder is described with it
    encoder = open_encoder(arguments)
    description = {"version": VERSION, "seed": arguments.seed, "size": arguments.size}
    options = {"unit": "pairs", "noun": "pairs", "groups_per_line": arguments.pairs_per_line, "keeps_pictures": True}
    maker = Maker(arguments, description, encoder=encoder, **options)
    tasks = {
        task: [scene_of(task, number, arguments) for number in range(arguments.num_images)] for task in arguments.tasks
    }
    return maker.make(tasks, progress)


def scene_of(task: str, number: int, arguments: argparse.Namespace) -> Item:
    name = f"{number:06d}"
    return Item(name, [pair_of(name)], partial(draw, task, number, arguments))


def draw(task: str, number: int, arguments: argparse.Namespace) -> list[Pair]:
    return [draw_pair(task, number, seed=arguments.seed, size=arguments.size)]


SCENES = MadeData(
    "drawn scenes of shapes with labels, as pairs of pictures and as codes",
    "Draws pairs TASK/NAME_img.png and NAME_label.png: scenes of shapes, and what each task makes of them. With a "
    "VQGAN, it also writes their codes to vision/TASK/train.bin. The same command resumes an interrupted run; a "
    "larger --num_images adds pairs.",
    add_options,
    make_scenes,
)
