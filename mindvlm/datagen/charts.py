"""Makes charts with the tables they show: bars (vertical and horizontal), lines, points and pies."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.chart_tables import ChartTable, random_table
from mindvlm.datagen.dataset import MadeSample, pick
from mindvlm.datagen.fonts import FontSet, find_fonts

try:
    from mindvlm.datagen.chart_drawing import draw_chart, is_crowded, ticks_to
except ModuleNotFoundError:
    raise UserError("charts need matplotlib, which is not installed; run: pip install matplotlib") from None

KINDS = ("bar", "barh", "line", "pie", "scatter")
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
LABELLED_SHARE = 0.7


@dataclass(kw_only=True)
class ChartOptions:
    """The look of charts.

    Attributes:
        kinds: to choose from, see `KINDS`.
        languages: to choose from; "zh" needs a font with Chinese characters.
        fonts: folder of further fonts.
        size: (width, height) in pixels.

    Raises:
        UserError: a kind or language is unknown, or the size is out of range.
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

    version = 2

    def __init__(self, options: ChartOptions):
        self.options = options
        self.fonts: FontSet = find_fonts(options.fonts)
        for language in options.languages:
            rng = np.random.default_rng(0)
            words = "".join(str(random_table(rng, language=language).as_dict()) for _ in range(200))
            self.fonts.check(Counter(words), f"charts in {language!r}")

    def make(self, rng: np.random.Generator) -> MadeSample:
        """Makes a chart, which depends on the options and `rng` alone."""
        kind, language = pick(rng, self.options.kinds), pick(rng, self.options.languages)
        has_points = kind in ("line", "scatter")
        limits = {"max_categories": 6, "max_series": 1} if kind == "pie" else {"max_categories": 10, "max_series": 3}
        table = random_table(rng, language=language, in_order=has_points, **limits)
        if kind == "pie":
            table = replace(table, x_title="", y_title="")
        is_labelled = kind == "pie" or rng.random() < LABELLED_SHARE
        if is_labelled and has_points:
            is_labelled = not is_crowded(table)
        if not is_labelled:
            table = _readable(table)
        answer = str(table.as_dict())
        font_path, _ = self.fonts.pick(answer, rng)
        image = draw_chart(table, kind, rng, font_path=font_path, size=self.options.size, is_labelled=is_labelled)
        return MadeSample(image, pick(rng, QUESTIONS[language]), answer)


def _readable(table: ChartTable) -> ChartTable:
    """Rounds the values to tenths of the distance between two ticks, so that they can be read off the axis."""
    unit = max(table.unit, float(ticks_to(table.values.max())[1]) / 10)
    return replace(table, values=np.maximum(1, np.rint(table.values / unit)) * unit)
