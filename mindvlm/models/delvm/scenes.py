"""Synthetic scenes of flat shapes, as pairs of a picture and its label for six tasks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 2
"""Raised when the same seed gives another pair than before."""
# Of different brightness, so that the colours of a grayscale picture can be known.
COLOURS = np.array([(40, 40, 200), (200, 30, 60), (40, 170, 70), (240, 130, 20), (90, 200, 230), (250, 230, 90)])
# Of each kind of shape in a segmentation; the background is black.
CLASSES = {"disc": (255, 0, 0), "rectangle": (0, 255, 0), "triangle": (0, 0, 255), "star": (255, 255, 0)}
CORNERS = {"rectangle": 4, "triangle": 3, "star": 10}
NUM_SHAPES = 2, 4
RADII = 0.13, 0.24


@dataclass(frozen=True)
class Scene:
    """Shapes over each other, the last one in front.

    Attributes:
        picture: RGB, on a gray background.
        index: (size, size), the number of the visible shape from 1; 0 for the background.
        kinds: the kind of each shape, as in `CLASSES`.
    """

    picture: Image.Image
    index: np.ndarray
    kinds: list[str]


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draws a random scene of size x size pixels. A shape lower in the picture is nearer."""
    index = Image.new("L", (size, size))
    draw, kinds = ImageDraw.Draw(index), []
    heights = np.sort(rng.uniform(0.15, 0.85, rng.integers(NUM_SHAPES[0], NUM_SHAPES[1] + 1))) * size
    for number, y in enumerate(heights.tolist(), 1):
        kind = list(CLASSES)[rng.integers(len(CLASSES))]
        x = rng.uniform(0.15, 0.85) * size
        radius, turn = rng.uniform(*RADII) * size, rng.uniform(0, 2 * math.pi)
        if kind == "disc":
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=number)
        else:
            draw.polygon(corners(kind, x, y, radius, turn), fill=number)
        kinds.append(kind)
    numbers = np.asarray(index)
    first, last = rng.uniform(90, 170, 2)
    background = np.repeat(np.linspace(first, last, size)[:, None, None], 3, 2).repeat(size, 1)
    colours = COLOURS[rng.integers(len(COLOURS), size=len(kinds))]
    pixels = np.where(numbers[..., None] > 0, colours[numbers.astype(int) - 1], background)
    return Scene(Image.fromarray(pixels.astype(np.uint8)), numbers, kinds)


def corners(kind: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Returns the corners of a shape around (x, y)."""
    count = CORNERS[kind]
    radii = [radius * (0.45 if kind == "star" and corner % 2 else 1) for corner in range(count)]
    angles = [turn + 2 * math.pi * corner / count for corner in range(count)]
    return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in zip(radii, angles, strict=True)]


Pair = tuple[Image.Image, Image.Image]


def segmentation(scene: Scene, rng: np.random.Generator) -> Pair:
    """The label has the colour of each shape's kind, see `CLASSES`."""
    table = np.array([(0, 0, 0), *(CLASSES[kind] for kind in scene.kinds)], np.uint8)
    return scene.picture, Image.fromarray(table[scene.index])


def edges(scene: Scene, rng: np.random.Generator) -> Pair:
    """The label has white borders between shapes on black, 1 % of the edge wide and at least 2 pixels."""
    inner, is_edge = scene.index, np.zeros(scene.index.shape, bool)
    # the pixels on both sides of a border
    differs = inner[1:] != inner[:-1], inner[:, 1:] != inner[:, :-1]
    for part in (is_edge[1:], is_edge[:-1]):
        part |= differs[0]
    for part in (is_edge[:, 1:], is_edge[:, :-1]):
        part |= differs[1]
    lines = Image.fromarray((is_edge * 255).astype(np.uint8))
    return scene.picture, lines.filter(ImageFilter.MaxFilter(2 * (len(inner) // 200) + 1)).convert("RGB")


def blur(scene: Scene, rng: np.random.Generator) -> Pair:
    """The picture is blurred; the label is sharp."""
    radius = rng.uniform(0.01, 0.025) * scene.picture.width
    return scene.picture.filter(ImageFilter.GaussianBlur(radius)), scene.picture


def rain(scene: Scene, rng: np.random.Generator) -> Pair:
    """The picture has bright streaks of one direction; the label has none."""
    size = scene.picture.width
    streaks = Image.new("L", (size, size))
    draw, slant = ImageDraw.Draw(streaks), rng.uniform(-0.35, 0.35)
    # below 128 pixels, a streak of one pixel is wider
    count = int(rng.integers(60, 140) * min(1, size / 128))
    for x, y, length in rng.uniform((-0.2, -0.2, 0.06), (1.2, 1, 0.16), (count, 3)) * size:
        draw.line([x, y, x + slant * length, y + length], fill=200, width=max(1, size // 128))
    rainy = scene.picture.copy()
    rainy.paste((235, 240, 245), (0, 0), streaks)
    return rainy, scene.picture


def colour(scene: Scene, rng: np.random.Generator) -> Pair:
    """The picture is gray; the label has the colours."""
    return scene.picture.convert("L").convert("RGB"), scene.picture


def depth(scene: Scene, rng: np.random.Generator) -> Pair:
    """The label is gray: the nearest shape white, the others darker in equal steps, the background black."""
    levels = np.linspace(0, 255, len(scene.kinds) + 1).astype(np.uint8)
    return scene.picture, Image.fromarray(levels[scene.index]).convert("RGB")


TASKS: dict[str, Callable[[Scene, np.random.Generator], Pair]] = {
    task.__name__: task for task in (segmentation, edges, blur, rain, colour, depth)
}


def draw_pair(task: str, number: int, *, seed: int, size: int) -> Pair:
    """Returns pair `number` of a task, which depends on the arguments alone."""
    rng = np.random.Generator(np.random.PCG64([seed, list(TASKS).index(task), number]))
    return TASKS[task](draw_scene(rng, size), rng)
