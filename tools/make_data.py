"""Make data to train on: pages with their text, charts with their tables, scenes, or data from public downloads."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mindvlm.core.errors import Parser

CHARTS = ("bar", "barh", "line", "pie", "scatter")
BENCHMARKS = ("scenes", "pope", "mme", "gqa", "page-ocr")
EXAMPLES = """examples:
  two hundred English pages from a text file:
    mindvlm-make-data pages --text book.txt --output data/pages --num_images 200
  Chinese and English pages in one to three columns, with the fonts of the system:
    mindvlm-make-data pages --text zh.txt en.txt --fonts /usr/share/fonts --columns 1 2 3 --output data/mixed
  small pages for small models:
    mindvlm-make-data pages --text book.txt --size 512 256 --max_characters 120 --output data/small
  charts in both languages:
    mindvlm-make-data charts --languages en zh --fonts FOLDER --output data/charts --num_images 1000
  drawn scenes with captions, or with questions and answers:
    mindvlm-make-data scenes --content captions --output data/scenes/captions --num_images 1000
  a benchmark of drawn scenes in the folder layout of POPE:
    mindvlm-make-data benchmark --name pope --output data/pope --num_images 50 --seed 7
  records of public data sets from local downloads, several in one folder; the help of each says where to get it:
    mindvlm-make-data PUBLIC_DATA --help
    mindvlm-make-data PUBLIC_DATA --source DOWNLOAD --output data/records --num_records 1000

A training job reads OUTPUT/registry.yaml, or the codes in OUTPUT/vision. The same command resumes an interrupted run; a
larger --num_images adds pictures. Charts need matplotlib: pip install matplotlib"""


def build_parser() -> argparse.ArgumentParser:
    # imported here: worker processes import this file and need none of it
    from mindvlm.models.registry import made_data, public_data

    public = {f"{family}-{name}": (name, data) for (family, name), data in public_data().items()}
    parser = Parser(
        prog="mindvlm-make-data",
        description=__doc__,
        epilog=EXAMPLES.replace("PUBLIC_DATA", next(iter(public))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
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
    scenes = kinds.add_parser("scenes", help="drawn scenes of shapes with captions or with questions")
    scenes.add_argument("--content", choices=["captions", "questions"], default="questions", help="(default questions)")
    scenes.add_argument("--size", type=int, default=96, help="edge of a picture in pixels (default 96)")
    scenes.add_argument("--num_questions", type=int, default=6, help="about each picture (default 6)")
    scenes.add_argument(
        "--kinds", nargs="+", metavar="KIND[=WEIGHT]", help="of questions (default: those of benchmarks, equally often)"
    )
    benchmark = kinds.add_parser("benchmark", help="a small benchmark of drawn pictures, for mindvlm-evaluate")
    benchmark.set_defaults(make=make_benchmark)
    benchmark.add_argument(
        "--name", choices=BENCHMARKS, default="scenes", help="page-ocr shows lines of text, the others scenes (scenes)"
    )
    benchmark.add_argument("--num_images", type=int, default=400, help="(default 400)")
    add_common_options(benchmark, "folder for --data")
    for one in (pages, charts):
        one.add_argument(
            "--fonts", type=os.path.expanduser, metavar="FOLDER", help="further fonts; the shipped ones lack Chinese"
        )
    for one in (pages, charts, scenes):
        one.set_defaults(make=make_images)
        add_common_options(one)
        one.add_argument("--num_images", type=int, default=100, help="(default 100)")
        one.add_argument("--image_format", choices=["png", "jpg"], default="png", help="(default png)")
        one.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the CPU's cores)"
        )
    for kind, (name, data) in public.items():
        files = data.needs | {path: f"optional: {description}" for path, description in data.takes.items()}
        needs = "\n".join(f"  {path:26}  {description}" for path, description in files.items())
        one = kinds.add_parser(
            kind,
            help=f"records of {data.title}",
            description=f"Prepares {data.title} from a download of {data.page}:\n\n{needs}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(make=prepare_records, data=data, name=name)
        one.add_argument(
            "--source", type=os.path.expanduser, required=True, metavar="FOLDER", help="the download, see above"
        )
        add_common_options(one)
        default = f"{data.num_records}; 0: all" if data.num_records else "all"
        one.add_argument("--num_records", type=int, metavar="N", help=f"items to draw at random (default: {default})")
    for (family, name), made in made_data().items():
        one = kinds.add_parser(f"{family}-{name}", help=made.help, description=made.description)
        one.set_defaults(make=made.make)
        add_common_options(one, made.output, is_seeded=made.is_seeded)
        made.add_options(one)
    return parser


def add_common_options(
    parser: argparse.ArgumentParser,
    output: str = "folder of images, annotations and registry",
    *,
    is_seeded: bool = True,
) -> None:
    """Adds the options of all kinds."""
    parser.add_argument("--output", type=os.path.expanduser, required=True, metavar="PATH", help=output)
    if is_seeded:
        parser.add_argument("--seed", type=int, default=1, help="(default 1)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status, see `cli.run`."""
    from mindvlm.tools import cli

    return cli.run(make, argv)


def make(argv: list[str] | None) -> int:
    """Makes the data that are missing."""
    arguments = build_parser().parse_args(argv)
    # imported here: worker processes import this file and need none of it
    from tqdm import tqdm

    from mindvlm.core.errors import UserError
    from mindvlm.tools.cli import say

    if getattr(arguments, "seed", 0) < 0:
        raise UserError(f"--seed is {arguments.seed}; expected 0 or more")
    bars: list[tqdm] = []

    def progress(count: int, total: int) -> None:
        # no bar before the first picture: an error in the options is then the only output
        if not bars:
            bars.append(tqdm(total=total, unit="item", desc=arguments.kind))
        bars[0].update(count - bars[0].n)

    try:
        lines = arguments.make(arguments, progress)
    finally:
        for bar in bars:
            bar.close()
    for line in lines:
        say(line)
    return 0


def prepare_records(arguments: argparse.Namespace, progress: Callable[[int, int], None]) -> list[str]:
    """Prepares a public data set. Returns the lines that say what was made."""
    from mindvlm.core.errors import UserError
    from mindvlm.datagen.public_data import prepare

    if arguments.num_records is not None and arguments.num_records < 0:
        raise UserError(f"--num_records is {arguments.num_records}; expected 0 or more")
    options = {"seed": arguments.seed, "num_records": arguments.num_records, "progress": progress}
    made = prepare(arguments.data, arguments.name, arguments.source, arguments.output, **options)
    where = f"{arguments.name}; data.registry: {arguments.output}/registry.yaml"
    return [*made.lines(), f"wrote {made.num_records} of {made.num_items} items as data set {where}"]


def make_benchmark(arguments: argparse.Namespace, progress: Callable[[int, int], None]) -> list[str]:
    """Draws a benchmark. Returns the line that says what was made."""
    from mindvlm.core.errors import UserError
    from mindvlm.datagen.benchmark_folders import write_benchmark

    if arguments.num_images < 1:
        raise UserError(f"--num_images is {arguments.num_images}; expected at least 1")
    options = {"num_images": arguments.num_images, "seed": arguments.seed, "progress": progress}
    write_benchmark(arguments.name, Path(arguments.output), **options)
    return [f"mindvlm-evaluate --benchmark {arguments.name} --data {arguments.output} --config_path MODEL"]


def make_images(arguments: argparse.Namespace, progress: Callable[[int, int], None]) -> list[str]:
    """Draws pages, charts or scenes. Returns the line that says what was made."""
    from mindvlm.core.errors import UserError
    from mindvlm.datagen.dataset import make_dataset

    if arguments.num_images < 1 or arguments.workers < 1:
        raise UserError("--num_images and --workers must be at least 1")
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
    elif arguments.kind == "scenes":
        from mindvlm.datagen.scene_data import CaptionMaker, QuestionMaker, SceneOptions

        maker = CaptionMaker if arguments.content == "captions" else QuestionMaker
        options = SceneOptions(size=arguments.size, num_questions=arguments.num_questions, kinds=arguments.kinds)
    else:
        from mindvlm.datagen.charts import ChartMaker, ChartOptions

        maker = ChartMaker
        options = ChartOptions(
            kinds=arguments.kinds, languages=arguments.languages, fonts=arguments.fonts, size=arguments.size
        )
    num_made = make_dataset(
        maker,
        options,
        arguments.output,
        num_images=arguments.num_images,
        seed=arguments.seed,
        image_format=arguments.image_format,
        num_workers=arguments.workers,
        progress=lambda count: progress(count, arguments.num_images),
    )
    return [f"made {num_made} of {arguments.num_images} images; data.registry: {arguments.output}/registry.yaml"]


if __name__ == "__main__":
    sys.exit(main())
