"""Drawn scenes of coloured shapes on a grid of nine cells, with at most one word.

Lengths and coordinates are shares of the picture's edge. x grows to the right, y grows downwards.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mindvlm.datagen.fonts import find_fonts, load_font

COLOURS = {
    "red": (214, 32, 38),
    "green": (36, 150, 56),
    "blue": (38, 72, 214),
    "yellow": (244, 220, 44),
    "orange": (245, 132, 20),
    "purple": (136, 40, 168),
    "white": (252, 252, 252),
    "pink": (250, 160, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
# half of an edge: a shape stays within its cell
SIZES = {"small": (0.08, 0.09), "large": (0.125, 0.14)}
MAX_SHIFT = 0.03
OUTLINE, OUTLINE_WIDTH = (16, 16, 16), 0.014
WORDS = ("stop", "exit", "open", "shop", "cafe", "taxi", "bus", "hotel", "bank", "park", "sale", "zoo")
GRID = 3
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""The names of the cells in reading order."""
MAX_THINGS = 5
WORD_SHARE = 0.4
FONT_SIZE = 0.19
BACKGROUND = 125, 205
TINT = 15
# shapes are drawn larger and reduced, which smooths their edges
OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape: its colour, size, centre and half its edge, and the number of its cell in reading order."""

    shape: str
    colour: str
    size: str
    cell: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order of their cells.

    Attributes:
        word: the text, "" for none.
        word_line: the line of cells with the text, 0 at the top; it has no shapes.
        background: RGB.
    """

    things: tuple[Thing, ...]
    word: str = ""
    word_line: int = 0
    background: tuple[int, int, int] = (165, 165, 165)


def random_scene(rng: np.random.Generator) -> Scene:
    """Returns a random scene of 1 to `MAX_THINGS` shapes, which depends on `rng` alone.

    In half of the scenes, some shapes share their shape or their colour, so that there is something to count.
    """
    word = WORDS[rng.integers(len(WORDS))] if rng.random() < WORD_SHARE else ""
    word_line = int(rng.choice((0, GRID - 1)))
    free = [cell for cell in range(GRID * GRID) if not word or cell // GRID != word_line]
    num_things = int(rng.integers(1, MAX_THINGS + 1))
    cells = sorted(rng.permutation(free)[:num_things].tolist())
    shapes = [SHAPES[number] for number in rng.integers(len(SHAPES), size=num_things)]
    colours = [list(COLOURS)[number] for number in rng.integers(len(COLOURS), size=num_things)]
    if rng.random() < 0.5:
        repeated = shapes if rng.random() < 0.5 else colours
        same = rng.permutation(num_things)[: rng.integers(1, num_things + 1)]
        for number in same:
            repeated[number] = repeated[same[0]]
    things = [random_thing(rng, *values) for values in zip(shapes, colours, cells, strict=True)]
    gray = rng.integers(*BACKGROUND)
    background = tuple(int(gray + tint) for tint in rng.integers(-TINT, TINT + 1, 3))
    return Scene(tuple(things), word, word_line, background)


def random_thing(rng: np.random.Generator, shape: str, colour: str, cell: int) -> Thing:
    """Returns a shape of random size and place within a cell."""
    size = list(SIZES)[rng.integers(len(SIZES))]
    radius = rng.uniform(*SIZES[size])
    room = min(0.5 / GRID - radius, MAX_SHIFT)
    line, column = divmod(cell, GRID)
    x, y = ((number + 0.5) / GRID + rng.uniform(-room, room) for number in (column, line))
    return Thing(shape, colour, size, cell, float(x), float(y), float(radius))


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """Returns the picture of a scene, of size x size pixels."""
    edge = size * OVERSAMPLING
    image = Image.new("RGB", (edge, edge), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, radius = thing.x * edge, thing.y * edge, thing.radius * edge
        draw_shape(draw, thing.shape, x, y, radius, 0, OUTLINE)
        draw_shape(draw, thing.shape, x, y, radius, OUTLINE_WIDTH * edge, COLOURS[thing.colour])
    if scene.word:
        font = load_font(find_fonts().paths[0], round(FONT_SIZE * edge))
        centre = edge / 2, (scene.word_line + 0.5) / GRID * edge
        draw.text(centre, scene.word.upper(), fill=OUTLINE, font=font, anchor="mm")
    return image.resize((size, size), Image.Resampling.BOX)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, inset: float, fill: tuple[int, int, int]
) -> None:
    """Draws a filled shape around (x, y), `inset` within its outline."""
    left, top, right, bottom = x - radius + inset, y - radius + inset, x + radius - inset, y + radius - inset
    if shape == "circle":
        draw.ellipse([left, top, right, bottom], fill=fill)
    elif shape == "square":
        gap = 0.12 * radius
        draw.rectangle([left + gap, top + gap, right - gap, bottom - gap], fill=fill)
    elif shape == "triangle":
        # the distance to a slanted side is `inset`, too
        slope = 0.62 * inset
        draw.polygon([(x, top + 1.24 * inset), (right - slope, bottom), (left + slope, bottom)], fill=fill)
    else:
        arm = 0.38 * radius - inset
        draw.rectangle([left, y - arm, right, y + arm], fill=fill)
        draw.rectangle([x - arm, top, x + arm, bottom], fill=fill)


def description(scene: Scene) -> str:
    """Returns a caption that lists the shapes in reading order, then the word."""
    parts = [describe(one) for one in scene.things]
    if scene.word:
        parts.append(f"the word {scene.word} at the {'bottom' if scene.word_line else 'top'}")
    return ", ".join(parts) + "."


def describe(thing: Thing) -> str:
    """Returns a phrase with all attributes of a shape and its place."""
    return f"a {thing.size} {thing.colour} {thing.shape} at the {PLACES[thing.cell]}"
