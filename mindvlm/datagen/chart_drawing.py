"""The plot area of a chart: axes, bars, lines, pie slices. Drawn at twice the size and reduced, for smooth edges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mindvlm.datagen.fonts import load_font

SCALE = 2
PALETTES = (
    ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    ("#264653", "#2a9d8f", "#e9c46a", "#f4a261", "#e76f51", "#8ab17d", "#b56576", "#6d597a", "#355070", "#eaac8b"),
    ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac"),
)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the finished picture."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


class Canvas:
    """A picture that takes coordinates of its finished size."""

    def __init__(self, width: int, height: int, *, font_path: str, ink: str, paper: str):
        self.font_path, self.ink = font_path, ink
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), paper)
        self.draw = ImageDraw.Draw(self.image)

    def finish(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)

    def text_width(self, text: str, size: float) -> float:
        return load_font(self.font_path, round(size * SCALE)).getlength(text) / SCALE

    def text(self, x: float, y: float, text: str, size: float, anchor: str = "mm") -> None:
        """`anchor`: l, m, r for the place of x; a, m, s (top, middle, baseline) for that of y."""
        font = load_font(self.font_path, round(size * SCALE))
        self.draw.text((x * SCALE, y * SCALE), text, fill=self.ink, font=font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=max(1, round(width * SCALE)), joint="curve")

    def rectangle(self, box: Box, colour: str) -> None:
        left, right = sorted((box.left, box.right))
        top, bottom = sorted((box.top, box.bottom))
        self.draw.rectangle([value * SCALE for value in (left, top, right, bottom)], fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.draw.ellipse([v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill=colour)

    def slice(self, x: float, y: float, radius: float, start: float, end: float, colour: str, border: str) -> None:
        """A slice of a pie; angles in degrees, clockwise from the right."""
        box = [v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.pieslice(box, start, end, fill=colour, outline=border, width=SCALE)


def ticks_to(largest: float, at_most: int = 7) -> list[float]:
    """Round numbers from 0 to beyond `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / at_most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * at_most >= largest * 1.02)
    return [step * i for i in range(math.ceil(largest * 1.02 / step) + 1)]


def fitting_size(canvas: Canvas, texts: Sequence[str], width: float, size: float, least: float) -> float:
    """The size at most `size` at which all texts are within `width`, but not below `least`."""
    widest = max((canvas.text_width(text, size) for text in texts), default=0.0)
    return max(least, min(size, size * width / max(widest, 1e-6)))


def centres(count: int, start: float, end: float) -> np.ndarray:
    """Middle of each of `count` equal parts."""
    return start + (np.arange(count) + 0.5) * (end - start) / count
