"""Draw how a model cuts a picture into tiles, and which feature rows it keeps for a question."""

import argparse
import math
import os
import sys

from mindvlm.core.errors import Parser, UserError

EXAMPLES = """examples:
  mindvlm-show-views --config_path FOLDER --image street.jpg --query "What does the sign say?" --output views.png
  mindvlm-show-views --config_path MODEL.yaml --image street.jpg --random_weights --output views.png

Rows that the model leaves out are dimmed."""
EDGE, GAP, LINE_HEIGHT = 252, 6, 20
PAPER, INK = (255, 255, 255), (40, 40, 40)
DIMMED = 0.22


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-show-views",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config_path", type=os.path.expanduser, required=True, metavar="PATH", help="a YAML or a checkpoint folder"
    )
    parser.add_argument("--image", type=os.path.expanduser, required=True, metavar="FILE", help="the picture")
    parser.add_argument("--query", default="What is in this picture?", help="the question (%(default)s)")
    parser.add_argument(
        "--output", type=os.path.expanduser, required=True, metavar="FILE.png", help="the drawing to write"
    )
    parser.add_argument(
        "--random_weights", action="store_true", help="do not read weights: shows the tiles of an untrained model"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")
    parser.add_argument("--mode", choices=["graph", "pynative"], default="pynative", help="(default pynative)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-show-views`; returns the exit status."""
    from mindvlm.tools import cli

    return cli.run(show, argv)


def show(argv: list[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    if not arguments.output.lower().endswith(".png"):
        raise UserError(f"--output is {arguments.output!r}; give a name that ends in .png")
    if os.path.exists(arguments.output) and os.path.realpath(arguments.output) == os.path.realpath(arguments.image):
        raise UserError(f"--output is the picture itself, {arguments.image}; give another name")
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; expected 0 or more")
    # MindSpore takes seconds to import; help and the errors above come before
    from mindvlm.checkpoint import atomic_file, check_writable
    from mindvlm.processing.images.loading import load_image
    from mindvlm.tools.cli import say

    check_writable(arguments.output)
    image = load_image(arguments.image)
    drawing, line = draw(load(arguments), image, arguments.query, is_random=arguments.random_weights)
    with atomic_file(arguments.output) as file:
        drawing.save(file, "PNG", optimize=True)
    say(f"{line}; wrote {arguments.output}")
    return 0


def load(arguments: argparse.Namespace):
    """Returns the `VisionLanguageModel` of the command line, with its weights or with random ones."""
    import mindvlm

    if not arguments.random_weights:
        return mindvlm.load(arguments.config_path, mode=arguments.mode)
    from mindvlm.core import runtime
    from mindvlm.models.loading import build_model
    from mindvlm.models.registry import get_family
    from mindvlm.models.run_config import read_config
    from mindvlm.sessions.vision_language_model import VisionLanguageModel
    from mindvlm.training.config import InitConfig
    from mindvlm.training.initial_weights import fill_weights

    config = read_config(arguments.config_path, {"mode": arguments.mode})
    family = get_family(config.family)
    processor, context = family.processor(config.processor), runtime.start(config)
    model, _ = build_model(family, config.model, context)
    options = {"fit": family.fit(config), "rules": family.initial_rules, "specs": {}}
    fill_weights(model, InitConfig(), seed=arguments.seed, **options)
    return VisionLanguageModel(model, processor, config)


def draw(model, image, query: str, *, is_random: bool = False):
    """Returns the drawing of a picture's views, a PIL image, and a line that says how many rows are kept.

    Args:
        model: a `VisionLanguageModel`.
        image: a PIL image.
        query: the question.
        is_random: whether the weights are random, which the drawing says.

    Raises:
        UserError: the prompt is too long, or the model cuts no tiles.
    """
    import numpy as np

    views = model.processor.shown_views(image)
    (picture,) = model.pictures(image)
    layout = picture.layout
    ids = model.processor.prompt(query, num_images=1, image_lengths=[len(layout)]).input_ids
    model.engine.check_length(len(ids))
    text = [token for token in ids if token != model.engine.placeholder_id]
    kept = layout[model.model.kept_placeholders(model.encoder.encode_views([picture])[0], layout, text)]
    is_kept = {view.title: np.isin(view.first_row + np.arange(view.side**2), kept) for view in views}
    tiles = [view for view in views if view.place]
    num_kept = sum(int(is_kept[view.title].sum()) for view in tiles)
    line = f"{num_kept} of {sum(view.side**2 for view in tiles)} rows of {len(tiles)} tiles are kept"
    panels = {view.title: drawn_cells(view, is_kept[view.title]) for view in views}

    title, original = f"picture, {image.width} x {image.height}", image.copy()
    original.thumbnail((2 * EDGE, EDGE))
    above = [(title, original), *((view.title, panels[view.title]) for view in views if not view.place)]
    name = f"{model.config.name}: random weights, an untrained model" if is_random else f"{model.config.name}"
    captions = [f"{name}. {line} for:", shown_query(query)]
    placed = [(panels[view.title], view.place) for view in tiles]
    return arranged(above, placed, "tiles; dimmed rows are left out", captions), line


def shown_query(query: str) -> str:
    """Returns the question as one line of at most 100 characters."""
    from mindvlm.datagen.fonts import characters_of

    line = " ".join(query.split())
    if not set(line) <= characters_of(font_path()):
        return "a question with characters that the font lacks"
    return line if len(line) <= 100 else f"{line[:97]}..."


def font_path() -> str:
    from mindvlm.datagen.fonts import find_fonts

    return next(path for path in find_fonts().paths if "Sans." in path)


def drawn_cells(view, is_kept):
    """Returns a view with a line around each cell and with the cells that are not kept dimmed.

    Args:
        view: a `ShownView`.
        is_kept: (side * side,) bool.
    """
    import numpy as np
    from PIL import Image

    cell = max(2, round(EDGE / view.side))
    edge = cell * view.side
    pixels = np.asarray(view.image.resize((edge, edge)), np.float32)
    mask = is_kept.reshape(view.side, view.side).repeat(cell, 0).repeat(cell, 1)[..., None]
    pixels = np.where(mask, pixels, DIMMED * pixels + (1 - DIMMED) * 225)
    for lines in (pixels[::cell], pixels[:, ::cell]):
        lines += 0.2 * (128 - lines)
    return Image.fromarray(pixels.astype(np.uint8))


def arranged(above: list, tiles: list, title: str, captions: list[str]):
    """Returns one image of titled panels in a row, below them the tiles in their grid, and lines of text.

    Args:
        above: (title, panel) from left to right.
        tiles: (panel, (column, line)).
        title: that of the tiles.
        captions: the lines of text.
    """
    from PIL import Image, ImageDraw

    from mindvlm.datagen.fonts import load_font

    font = load_font(font_path(), 13)
    columns, lines = (max(place[axis] for _, place in tiles) + 1 for axis in (0, 1))
    width, height = tiles[0][0].size
    top = LINE_HEIGHT + max(panel.height for _, panel in above) + GAP
    widths = [sum(max(panel.width, font.getlength(name)) + 2 * GAP for name, panel in above), columns * (width + GAP)]
    total = math.ceil(max(*widths, *map(font.getlength, captions))) + GAP
    bottom = top + LINE_HEIGHT + lines * (height + GAP)
    sheet = Image.new("RGB", (total, bottom + len(captions) * LINE_HEIGHT + GAP), PAPER)
    pen, left = ImageDraw.Draw(sheet), GAP
    for name, panel in above:
        pen.text((left, GAP // 2), name, fill=INK, font=font)
        sheet.paste(panel, (left, LINE_HEIGHT))
        left += math.ceil(max(panel.width, font.getlength(name))) + 2 * GAP
    pen.text((GAP, top + GAP // 2), title, fill=INK, font=font)
    for panel, (column, line) in tiles:
        sheet.paste(panel, (GAP + column * (width + GAP), top + LINE_HEIGHT + line * (height + GAP)))
    for number, caption in enumerate(captions):
        pen.text((GAP, bottom + GAP // 2 + number * LINE_HEIGHT), caption, fill=INK, font=font)
    # a palette keeps the file small
    return sheet.quantize(256)


if __name__ == "__main__":
    sys.exit(main())
