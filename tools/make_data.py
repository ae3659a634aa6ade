"""Makes pictures to train on: document pages with their text, or charts with their tables."""

import argparse
import os
import sys

from mindvlm.core.errors import Parser

CHARTS = ("bar", "barh", "line", "pie", "scatter")
EXAMPLES = """examples:
  two hundred English pages from a text file:
    mindvlm-make-data pages --text book.txt --output data/pages --num_images 200
  Chinese and English pages in one to three columns, with the fonts of the system:
    mindvlm-make-data pages --text zh.txt en.txt --fonts /usr/share/fonts --columns 1 2 3 --output data/mixed
  small pages for small models:
    mindvlm-make-data pages --text book.txt --size 512 256 --max_characters 120 --output data/small
  charts in both languages:
    mindvlm-make-data charts --languages en zh --fonts FOLDER --output data/charts --num_images 1000

A training job reads OUTPUT/registry.yaml. The same command resumes an interrupted run; a larger --num_images adds
pictures. Charts need matplotlib: pip install mindvlm[plots]"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-make-data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="pages|charts")
    pages = kinds.add_parser("pages", help="document pages with the text on them")
    pages.add_argument(
        "--text", nargs="+", type=os.path.expanduser, required=True, metavar="FILE", help="UTF-8 text files of any size"
    )
    pages.add_argument("--size", nargs=2, type=int, default=[1000, 1414], metavar=("WIDTH", "HEIGHT"), help="in pixels")
    pages.add_argument("--columns", nargs="+", type=int, default=[1, 2], metavar="N", help="to choose from (1 2)")
    pages.add_argument("--font_size", nargs=2, type=int, default=[16, 28], metavar=("LEAST", "MOST"), help="(16 28)")
    pages.add_argument("--max_characters", type=int, default=0, help="on a page; 0 (default) fills it")
    pages.add_argument(
        "--line_breaks", choices=["join", "keep"], default="join", help="answers with paragraphs (default) or lines"
    )
    charts = kinds.add_parser("charts", help="charts with their tables as python dicts")
    charts.add_argument("--kinds", nargs="+", default=list(CHARTS), metavar="KIND", help=f"of {' '.join(CHARTS)} (all)")
    charts.add_argument("--languages", nargs="+", default=["en"], metavar="en|zh", help="to choose from (en)")
    charts.add_argument("--size", nargs=2, type=int, default=[800, 600], metavar=("WIDTH", "HEIGHT"), help="in pixels")
    for one in (pages, charts):
        one.add_argument(
            "--output",
            type=os.path.expanduser,
            required=True,
            metavar="FOLDER",
            help="of images, annotations and registry",
        )
        one.add_argument("--num_images", type=int, default=100, help="(default 100)")
        one.add_argument("--seed", type=int, default=1, help="(default 1)")
        one.add_argument(
            "--fonts", type=os.path.expanduser, metavar="FOLDER", help="further fonts; the shipped ones lack Chinese"
        )
        one.add_argument("--image_format", choices=["png", "jpg"], default="png", help="(default png)")
        one.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the CPU's cores)"
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status, see `cli.run`."""
    from mindvlm.tools import cli

    return cli.run(make, argv)


def make(argv: list[str] | None) -> int:
    """Makes the pictures that are missing."""
    arguments = build_parser().parse_args(argv)
    # imported here: worker processes import this file and need none of it
    from tqdm import tqdm

    from mindvlm.core.errors import UserError
    from mindvlm.datagen.dataset import make_dataset
    from mindvlm.tools.cli import say

    if arguments.num_images < 1 or arguments.workers < 1 or arguments.seed < 0:
        raise UserError("--num_images and --workers must be at least 1, --seed at least 0")
    if arguments.kind == "pages":
        from mindvlm.datagen.pages import PageMaker, PageOptions

        maker = PageMaker
        options = PageOptions(
            text=[os.path.abspath(path) for path in arguments.text],
            fonts=arguments.fonts,
            size=arguments.size,
            columns=arguments.columns,
            font_sizes=arguments.font_size,
            max_characters=arguments.max_characters,
            line_breaks=arguments.line_breaks,
        )
    else:
        from mindvlm.datagen.charts import ChartMaker, ChartOptions

        maker = ChartMaker
        options = ChartOptions(
            kinds=arguments.kinds, languages=arguments.languages, fonts=arguments.fonts, size=arguments.size
        )
    bars: list[tqdm] = []

    def progress(count: int) -> None:
        # no bar before the first picture: an error in the options is then the only output
        if not bars:
            bars.append(tqdm(total=arguments.num_images, unit="image", desc=arguments.kind))
        bars[0].update(count - bars[0].n)

    try:
        num_made = make_dataset(
            maker,
            options,
            arguments.output,
            num_images=arguments.num_images,
            seed=arguments.seed,
            image_format=arguments.image_format,
            num_workers=arguments.workers,
            progress=progress,
        )
    finally:
        for bar in bars:
            bar.close()
    say(f"made {num_made} of {arguments.num_images} images; data.registry: {arguments.output}/registry.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
