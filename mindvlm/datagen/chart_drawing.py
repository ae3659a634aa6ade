"""Draws a table as a chart with matplotlib, in the many styles that people use."""

from collections.abc import Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mindvlm.datagen.chart_tables import ChartTable
from mindvlm.datagen.dataset import pick
from mindvlm.datagen.fonts import load_font

STYLES = ("default", "default", "default", "seaborn-v0_8-whitegrid", "seaborn-v0_8-darkgrid", "ggplot", "bmh")
STYLES += ("fivethirtyeight", "Solarize_Light2", "tableau-colorblind10", "seaborn-v0_8-ticks")
PALETTES = (
    ("#264653", "#e76f51", "#2a9d8f", "#e9c46a", "#6d597a", "#8ab17d", "#b56576", "#f4a261", "#355070", "#eaac8b"),
    ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac"),
    ("#003f5c", "#ffa600", "#bc5090", "#7a9cc6", "#ff6361", "#58508d", "#4d9078", "#c97b63", "#6b7a8f", "#d0a5c0"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
STACKED_SHARE, AREA_SHARE, DONUT_SHARE, GRID_SHARE = 0.35, 0.2, 0.3, 0.6
LEAST_TEXT = 7.0
"""Pixels; text is not made smaller than this to fit."""
LEAST_SEGMENT, LEAST_SLICE, LEAST_GAP = 0.07, 0.07, 0.06
"""The smallest share of the axis or the pie that has room for a number."""
DPI = 100


def draw_chart(
    table: ChartTable, kind: str, rng: np.random.Generator, *, font_path: str, size: Sequence[int], is_labelled: bool
) -> Image.Image:
    """Draws `table` as a chart; the picture depends on the arguments alone.

    Args:
        kind: "bar", "barh", "line", "scatter" or "pie".
        font_path: font of all text.
        size: (width, height) in pixels.
        is_labelled: write each value beside its mark; a pie always does.
    """
    with matplotlib.style.context(pick(rng, STYLES), after_reset=True):
        return _Chart(table, rng, font_path, size, is_labelled).draw(kind)


def ticks_to(largest: float) -> np.ndarray:
    """Round numbers from 0 to beyond `largest`."""
    return MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(0, 1.02 * largest)


def is_crowded(table: ChartTable) -> bool:
    """Whether the series come so close to each other that labels of their points would overlap."""
    gaps = np.diff(np.sort(table.values, axis=0), axis=0)
    return gaps.size > 0 and gaps.min() < LEAST_GAP * table.values.max()


class _Chart:
    """The figure of one chart and its random look. Sizes of text are in pixels."""

    def __init__(
        self, table: ChartTable, rng: np.random.Generator, font_path: str, size: Sequence[int], is_labelled: bool
    ):
        self.table, self.rng, self.font_path, self.is_labelled = table, rng, font_path, is_labelled
        self.figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_subplot()
        palette = pick(rng, (*PALETTES, matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]))
        self.colours = list(np.roll(palette, int(rng.integers(len(palette)))))
        self.text_size = max(LEAST_TEXT, min(size) * float(rng.uniform(0.026, 0.036)))
        self.labels: list[Text] = []

    def draw(self, kind: str) -> Image.Image:
        size = self.text_size
        title = self.axes.set_title(
            self.table.title, fontsize=points(size * float(self.rng.uniform(1.15, 1.5))), loc=self.title_place()
        )
        margin = size * 0.8 / DPI
        self.layout = self.figure.get_layout_engine()
        self.layout.set(w_pad=margin, h_pad=margin)
        {"bar": self.bars, "barh": self.lying_bars, "line": self.lines, "scatter": self.dots, "pie": self.pie}[kind]()
        for text in self.figure.findobj(Text):
            text.get_fontproperties().set_file(self.font_path)
            text.set_parse_math(False)
        # a second layout is slow, and only turned names need it
        self.layout.execute(self.figure)
        self.figure.set_layout_engine("none")
        area = self.axes.get_window_extent()
        middle = (area.x0 + area.x1) / 2
        shrink([title], 1.9 * min(middle, self.figure.bbox.width - middle) if kind == "pie" else 0.9 * area.width)
        if kind != "pie":
            self.fit_text(is_lying=kind == "barh")
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())

    def title_place(self) -> str:
        return "center" if self.rng.random() < 0.8 else "left"

    def bars(self) -> None:
        self.grouped_or_stacked(is_lying=False)

    def lying_bars(self) -> None:
        self.grouped_or_stacked(is_lying=True)
        # from the top downwards, as one reads
        self.axes.invert_yaxis()

    def grouped_or_stacked(self, *, is_lying: bool) -> None:
        values = self.table.values
        totals = values.sum(axis=0)
        has_room = self.is_labelled and len(values) > 1 and values.min() >= LEAST_SEGMENT * totals.max()
        is_stacked = has_room and self.rng.random() < STACKED_SHARE
        places = np.arange(values.shape[1])
        thickness = float(self.rng.uniform(0.6, 0.85)) / (1 if is_stacked else len(values))
        draw = self.axes.barh if is_lying else self.axes.bar
        border = {"edgecolor": pick(self.rng, ("white", "#303030", "none")), "linewidth": 0.7}
        start = np.zeros(values.shape[1])
        for row, lengths in enumerate(values):
            shift = 0.0 if is_stacked else (row - (len(values) - 1) / 2) * thickness
            options = {"color": self.colours[row], "label": self.table.series[row], **border}
            bars = draw(places + shift, lengths, thickness, **{"left" if is_lying else "bottom": start}, **options)
            if self.is_labelled:
                place = (
                    {"label_type": "center", "color": contrasting(self.colours[row])} if is_stacked else {"padding": 2}
                )
                texts = [self.table.written(value) for value in lengths]
                self.labels += self.axes.bar_label(bars, texts, fontsize=points(0.9 * self.text_size), **place)
            if is_stacked:
                start = start + lengths
        self.label_axes(totals.max() if is_stacked else values.max(), is_lying=is_lying)

    def lines(self) -> None:
        marker = pick(self.rng, (*MARKERS, ""))
        width = float(self.rng.uniform(1.4, 3.0))
        is_dashed, is_area = self.rng.random() < 0.2, len(self.table.values) == 1 and self.rng.random() < AREA_SHARE
        places = np.arange(self.table.values.shape[1])
        for row, values in enumerate(self.table.values):
            options = {"marker": marker, "linewidth": width, "color": self.colours[row]}
            style = "--" if is_dashed and row == 0 else "-"
            self.axes.plot(places, values, style, label=self.table.series[row], **options)
            if is_area:
                self.axes.fill_between(places, values, color=self.colours[row], alpha=0.25)
        self.label_points()
        self.label_axes(self.table.values.max())

    def dots(self) -> None:
        area = (points(self.text_size) * float(self.rng.uniform(0.5, 0.9))) ** 2
        places = np.arange(self.table.values.shape[1])
        for row, values in enumerate(self.table.values):
            options = {"marker": MARKERS[row], "color": self.colours[row], "label": self.table.series[row]}
            self.axes.scatter(places, values, s=area, zorder=3, **options)
        self.label_points()
        self.label_axes(self.table.values.max())

    def pie(self) -> None:
        values, names = self.table.values[0], self.table.categories
        shares = values / values.sum()
        least = float(shares.min())
        ways = ["legend"] + ["beside"] * (2 if least >= LEAST_SLICE / 2 else 0) + ["inside"] * (least >= LEAST_SLICE)
        way = pick(self.rng, ways)
        size = {"fontsize": points(self.text_size)}
        both = [f"{name}: {self.table.written(value)}" for name, value in zip(names, values, strict=True)]
        width = 0.45 if way != "inside" and self.rng.random() < DONUT_SHARE else 1.0
        wedges, *_ = self.axes.pie(
            values,
            labels=both if way == "beside" else None,
            colors=self.colours[: len(values)],
            startangle=float(self.rng.uniform(0, 360)),
            counterclock=False,
            wedgeprops={"width": width, "edgecolor": "white", "linewidth": float(self.rng.uniform(0.5, 2))},
            textprops=size,
        )
        if way == "inside":
            for wedge, value in zip(wedges, values, strict=True):
                angle = np.radians((wedge.theta1 + wedge.theta2) / 2)
                place = {"ha": "center", "va": "center", "color": contrasting(wedge.get_facecolor())}
                text = self.table.written(value)
                self.axes.text(0.68 * np.cos(angle), 0.68 * np.sin(angle), text, **size, **place)
        if way != "beside":
            self.legend(wedges, names if way == "inside" else both)

    def label_points(self) -> None:
        if not self.is_labelled:
            return
        table_values = self.table.values
        for row, values in enumerate(table_values):
            # beside the line, not on it: above peaks and below valleys, except near the axis
            around = np.pad(values, 1, mode="edge")
            is_valley = (values < (around[:-2] + around[2:]) / 2) & (values > 0.12 * values.max())
            is_highest = table_values.argmax(axis=0) == row
            for place, value in enumerate(values):
                above = is_highest[place] if len(table_values) > 1 else not is_valley[place]
                options = {"xytext": (0, 5 if above else -5), "va": "bottom" if above else "top", "ha": "center"}
                text = self.axes.annotate(
                    self.table.written(value),
                    (place, value),
                    textcoords="offset points",
                    fontsize=points(0.9 * self.text_size),
                    **options,
                )
                self.labels.append(text)

    def label_axes(self, largest: float, *, is_lying: bool = False) -> None:
        """Sets limits, ticks, titles, grid and legend of a chart with two axes; values reach from 0 to `largest`."""
        axes, table, size = self.axes, self.table, points(self.text_size)
        names: Axis = axes.yaxis if is_lying else axes.xaxis
        numbers: Axis = axes.xaxis if is_lying else axes.yaxis
        ticks = ticks_to(largest)
        numbers.set_ticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=size)
        names.set_ticks(range(len(table.categories)), table.categories, fontsize=size)
        end = max(ticks[-1], 1.14 * largest) if self.is_labelled else ticks[-1]
        (axes.set_xlim if is_lying else axes.set_ylim)(0, end)
        names.set_label_text(table.x_title, fontsize=size)
        numbers.set_label_text(table.y_title, fontsize=size)
        axes.grid(False)
        if self.rng.random() < GRID_SHARE:
            numbers.grid(True, linestyle=pick(self.rng, ("-", "--", ":")))
        axes.set_axisbelow(True)
        if self.rng.random() < 0.5:
            axes.spines[["top", "right"]].set_visible(False)
        if len(table.series) > 1:
            self.legend(*axes.get_legend_handles_labels())

    def legend(self, handles: Sequence[Patch], texts: Sequence[str]) -> None:
        place = pick(self.rng, ("outside lower center", "outside right center"))
        columns = 1
        if "lower" in place:
            font = load_font(self.font_path, round(self.text_size))
            entry = max(map(font.getlength, texts)) + 4 * self.text_size
            columns = max(1, min(len(texts), 3, int(self.figure.bbox.width / entry)))
        self.figure.legend(handles, texts, loc=place, ncols=columns, fontsize=points(self.text_size))

    def fit_text(self, *, is_lying: bool) -> None:
        """Makes the names and numbers fit beside each other: smaller, and turned where that does not do."""
        area = self.axes.get_window_extent()
        num_names, num_series = len(self.table.categories), len(self.table.series)
        if is_lying:
            room = 0.8 * area.height / num_names
            shrink(self.axes.get_yticklabels(), room, axis="height")
            shrink(self.labels, room / num_series, axis="height")
            numbers = self.axes.get_xticklabels()
            if not shrink(numbers, 0.9 * area.width / len(numbers)):
                self.axes.set_xticks(
                    self.axes.get_xticks(), [t.get_text() * (i % 2 == 0) for i, t in enumerate(numbers)]
                )
            return
        room = area.width / num_names
        if not shrink(self.axes.get_xticklabels(), 0.92 * room):
            for text in self.axes.get_xticklabels():
                text.set(rotation=40, rotation_mode="anchor", ha="right", fontsize=points(0.9 * self.text_size))
            self.figure.set_layout_engine(self.layout)
        is_grouped = bool(self.axes.containers) and not any(text.get_va() == "center" for text in self.labels)
        if not shrink(self.labels, 0.95 * room / (1.2 * num_series if is_grouped else 1)) and is_grouped:
            size = points(min(0.9 * self.text_size, max(LEAST_TEXT, room / (1.4 * num_series))))
            for text in self.labels:
                text.set(rotation=90, fontsize=size)
            self.axes.set_ylim(0, 1.1 * self.axes.get_ylim()[1])


def shrink(texts: Sequence[Text], room: float, *, axis: str = "width") -> bool:
    """Makes all texts as small as the largest needs to fit into `room` pixels; returns whether that is legible."""
    largest = max((getattr(text.get_window_extent(), axis) for text in texts), default=0.0)
    if largest <= room:
        return True
    size = texts[0].get_fontsize() * room / largest
    for text in texts:
        text.set_fontsize(max(size, points(LEAST_TEXT)))
    return size >= points(LEAST_TEXT)


def points(pixels: float) -> float:
    """Converts pixels of the picture into typographic points, matplotlib's unit."""
    return pixels * 72 / DPI


def contrasting(colour: object) -> str:
    """Returns black or white, whichever is easier to read on `colour`."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "#202020" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
