"""Charts with the tables that they show: bars (upright and lying), lines and pies."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.chart_drawing import PALETTES, Box, Canvas, centres, fitting_size, ticks_to
from mindvlm.datagen.chart_tables import ChartTable, random_table
from mindvlm.datagen.fonts import FontSet, find_fonts
from mindvlm.datagen.made import MadeSample, pick

KINDS = ("bar", "barh", "line", "pie")
LANGUAGES = ("en", "zh")
QUESTIONS = {
    "en": (
        "Convert the chart to a python dict.",
        "Give the data of this chart as a python dictionary.",
        "Extract the table behind this chart as a python dict.",
        "Which values does the chart show? Answer with a python dict.",
        "Turn this figure into a python dict.",
    ),
    "zh": (
        "将图表转成python字典格式。",
        "请用python字典给出这张图表的数据。",
        "提取图中的数据，以python字典输出。",
        "这张图表显示了哪些数值？请用python字典回答。",
        "把这幅图转成python dict。",
    ),
}
LABELLED_SHARE, GRID_SHARE = 0.7, 0.6
LEAST_TEXT = 7.0


@dataclass(kw_only=True)
class ChartOptions:
    """What charts look like.

    Attributes:
        kinds: to choose from.
        languages: to choose from; "zh" needs a font with Chinese characters.
        fonts: folder of further fonts.
        size: (width, height) in pixels.
    """

    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    languages: list[str] = field(default_factory=lambda: ["en"])
    fonts: str | None = None
    size: list[int] = field(default_factory=lambda: [800, 600])

    def __post_init__(self) -> None:
        for name, chosen, known in (("kinds", self.kinds, KINDS), ("languages", self.languages, LANGUAGES)):
            if not chosen or set(chosen) - set(known):
                raise UserError(f"{name} is {chosen}; choose from {', '.join(known)}")
        if min(self.size) < 256 or max(self.size) > 4096:
            raise UserError(f"size {self.size[0]} x {self.size[1]}: expected 256 to 4096 pixels each")


class ChartMaker:
    """Draws charts. Raises UserError if a font cannot be used, or no font has the characters of a language."""

    def __init__(self, options: ChartOptions):
        self.options = options
        self.fonts: FontSet = find_fonts(options.fonts)
        for language in options.languages:
            rng = np.random.default_rng(0)
            words = "".join(str(random_table(rng, language=language).as_dict()) for _ in range(200))
            self.fonts.check(Counter(words), f"charts in {language!r}")

    def make(self, rng: np.random.Generator) -> MadeSample:
        """A chart; depends on the options and on `rng` alone."""
        kind, language = pick(rng, self.options.kinds), pick(rng, self.options.languages)
        most = 6 if kind == "pie" else 10
        series = 1 if kind == "pie" else 3
        table = random_table(rng, language=language, max_categories=most, max_series=series, in_order=kind == "line")
        if kind == "pie":
            table = replace(table, x_title="", y_title="")
        is_labelled = kind == "pie" or rng.random() < LABELLED_SHARE
        if not is_labelled:
            table = _readable(table)
        font_path, _ = self.fonts.pick(str(table.as_dict()), rng)
        answer = str(table.as_dict())
        image = _Chart(table, kind, rng, font_path, self.options.size, is_labelled).draw()
        return MadeSample(image, pick(rng, QUESTIONS[language]), answer)


def _readable(table: ChartTable) -> ChartTable:
    """The table with values that can be read off the axis: tenths of what lies between two of its marks."""
    unit = max(table.unit, ticks_to(table.values.max())[1] / 10)
    return replace(table, values=np.maximum(1, np.rint(table.values / unit)) * unit)


class _Chart:
    """One chart while it is drawn."""

    def __init__(
        self,
        table: ChartTable,
        kind: str,
        rng: np.random.Generator,
        font_path: str,
        size: list[int],
        is_labelled: bool,
    ):
        self.table, self.kind, self.rng = table, kind, rng
        width, height = size
        self.canvas = Canvas(width, height, font_path=font_path, ink="#202020", paper=pick(rng, ("#ffffff", "#fbfaf6")))
        palette = pick(rng, PALETTES)
        self.colours = [palette[i] for i in rng.permutation(len(palette))]
        self.text_size = min(width, height) * float(rng.uniform(0.024, 0.032))
        self.is_labelled = is_labelled
        self.has_grid = rng.random() < GRID_SHARE

    def draw(self):
        canvas, table, size = self.canvas, self.table, self.text_size
        width, height = canvas.size
        title_size = fitting_size(canvas, [table.title], 0.9 * width, 1.5 * size, LEAST_TEXT)
        canvas.text(width / 2, 0.05 * height, table.title, title_size)
        top = 0.11 * height
        if len(table.series) > 1:
            self.draw_legend(table.series, top)
            top += 2.2 * size
        box = Box(0.1 * width, top + size, 0.95 * width, 0.86 * height)
        if self.kind == "pie":
            self.draw_pie(Box(0.05 * width, top, 0.95 * width, 0.95 * height))
        elif self.kind == "barh":
            names = fitting_size(canvas, table.categories, 0.2 * width, size, LEAST_TEXT)
            room = max(canvas.text_width(name, names) for name in table.categories)
            self.draw_lying_bars(Box(0.07 * width + room, box.top, 0.93 * width, box.bottom), names)
        else:
            self.draw_upright(box)
        return canvas.finish()

    def draw_legend(self, names, y: float) -> None:
        size = self.text_size
        widths = [self.canvas.text_width(name, size) + 3.2 * size for name in names]
        x = (self.canvas.size[0] - sum(widths)) / 2
        for name, width, colour in zip(names, widths, self.colours, strict=False):
            self.canvas.rectangle(Box(x, y - 0.4 * size, x + 1.2 * size, y + 0.4 * size), colour)
            self.canvas.text(x + 1.6 * size, y, name, size, "lm")
            x += width

    def label(self, value: float) -> str:
        return str(self.table.number(value))

    def draw_upright(self, box: Box) -> None:
        canvas, table, size = self.canvas, self.table, self.text_size
        ticks = ticks_to(table.values.max())
        ys = box.bottom - np.array(ticks) / ticks[-1] * box.height
        for tick, y in zip(ticks, ys, strict=True):
            if self.has_grid:
                canvas.line([(box.left, y), (box.right, y)], "#d8d8d8")
            canvas.text(box.left - 0.5 * size, y, f"{tick:g}", size, "rm")
        canvas.line([(box.left, box.top), (box.left, box.bottom), (box.right, box.bottom)], canvas.ink)
        xs = centres(len(table.categories), box.left, box.right)
        step = box.width / len(xs)
        name_size = fitting_size(canvas, table.categories, 0.95 * step, size, LEAST_TEXT)
        for x, name in zip(xs, table.categories, strict=True):
            canvas.text(x, box.bottom + size, name, name_size)
        if table.x_title:
            canvas.text((box.left + box.right) / 2, box.bottom + 2.6 * size, table.x_title, size)
        if table.y_title:
            canvas.text(box.left, box.top - 1.1 * size, table.y_title, size, "lm")
        heights = box.bottom - table.values / ticks[-1] * box.height
        if self.kind == "bar":
            self.draw_bars(box, xs, step, heights)
        else:
            self.draw_lines(xs, step, heights)

    def draw_bars(self, box: Box, xs: np.ndarray, step: float, tops: np.ndarray) -> None:
        width = 0.78 * step / len(tops)
        label_size = fitting_size(
            self.canvas, [self.label(v) for v in self.table.values.flat], width, self.text_size, LEAST_TEXT
        )
        for row, (values, ys) in enumerate(zip(self.table.values, tops, strict=True)):
            for x, value, y in zip(xs - 0.39 * step + row * width, values, ys, strict=True):
                self.canvas.rectangle(Box(x, y, x + 0.94 * width, box.bottom), self.colours[row])
                if self.is_labelled:
                    self.canvas.text(x + width / 2, y - 0.7 * label_size, self.label(value), label_size)

    def draw_lines(self, xs: np.ndarray, step: float, heights: np.ndarray) -> None:
        texts = [self.label(value) for value in self.table.values.flat]
        label_size = fitting_size(self.canvas, texts, 0.9 * step, 0.9 * self.text_size, LEAST_TEXT)
        for row, (values, ys) in enumerate(zip(self.table.values, heights, strict=True)):
            self.canvas.line(list(zip(xs, ys, strict=True)), self.colours[row], 2.0)
            for x, value, y in zip(xs, values, ys, strict=True):
                self.canvas.dot(x, y, 3.0, self.colours[row])
                if self.is_labelled:
                    self.canvas.text(x, y - 0.9 * label_size, self.label(value), label_size)

    def draw_lying_bars(self, box: Box, name_size: float) -> None:
        canvas, table, size = self.canvas, self.table, self.text_size
        ticks = ticks_to(table.values.max() * 1.05)
        tick_size = fitting_size(
            canvas, [f"{tick:g}" for tick in ticks], 0.8 * box.width / len(ticks), size, LEAST_TEXT
        )
        for tick in ticks:
            x = box.left + tick / ticks[-1] * box.width
            if self.has_grid:
                canvas.line([(x, box.top), (x, box.bottom)], "#d8d8d8")
            canvas.text(x, box.bottom + size, f"{tick:g}", tick_size)
        canvas.line([(box.left, box.top), (box.left, box.bottom), (box.right, box.bottom)], canvas.ink)
        ys = centres(len(table.categories), box.top, box.bottom)
        height = 0.78 * box.height / len(ys) / len(table.series)
        label_size = max(LEAST_TEXT, min(size, height))
        for name, y in zip(table.categories, ys, strict=True):
            canvas.text(
                box.left - 0.5 * size, y, name, min(name_size, max(LEAST_TEXT, 0.9 * box.height / len(ys))), "rm"
            )
        for row, values in enumerate(table.values):
            for value, y in zip(values, ys - 0.39 * box.height / len(ys) + row * height, strict=True):
                x = box.left + value / ticks[-1] * box.width
                canvas.rectangle(Box(box.left, y, x, y + 0.92 * height), self.colours[row])
                if self.is_labelled:
                    canvas.text(x + 0.3 * size, y + height / 2, self.label(value), label_size, "lm")
        # the values lie along the lower axis
        if table.y_title:
            canvas.text((box.left + box.right) / 2, box.bottom + 2.6 * size, table.y_title, size)
        if table.x_title:
            canvas.text(box.left, box.top - 1.1 * size, table.x_title, size, "mm")

    def draw_pie(self, box: Box) -> None:
        canvas, table, size = self.canvas, self.table, self.text_size
        radius = 0.36 * min(box.width, box.height)
        x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
        shares = table.values[0] / table.values[0].sum()
        start = float(self.rng.uniform(0, 360))
        for i, (name, value, share) in enumerate(zip(table.categories, table.values[0], shares, strict=True)):
            end = start + 360 * share
            canvas.slice(x, y, radius, start, end, self.colours[i], "#ffffff")
            middle = np.radians((start + end) / 2)
            direction = np.array([np.cos(middle), np.sin(middle)])
            near, far = (np.array([x, y]) + direction * radius * factor for factor in (1.0, 1.12))
            canvas.line([tuple(near), tuple(far)], canvas.ink)
            side = "l" if direction[0] >= 0 else "r"
            offset = 0.4 * size if side == "l" else -0.4 * size
            canvas.text(far[0] + offset, far[1], f"{name}: {self.label(value)}", size, side + "m")
            start = end
