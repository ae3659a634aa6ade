import ast
import subprocess
import sys

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.datagen import fonts
from mindvlm.datagen.chart_drawing import draw_chart, ticks_to
from mindvlm.datagen.chart_tables import random_table
from mindvlm.datagen.charts import KINDS, QUESTIONS, ChartMaker, ChartOptions
from mindvlm.tools import make_data


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_a_python_dict_of_what_is_drawn(kind):
    maker = ChartMaker(ChartOptions(kinds=[kind], size=[400, 300]))
    for seed in range(12):
        made = maker.make(np.random.default_rng(seed))
        table = ast.literal_eval(made.answer)
        assert set(table) <= {"title", "x_title", "y_title", "values"} and table["title"]
        values = table["values"].values()
        numbers = [n for v in values for n in (v.values() if isinstance(v, dict) else [v])]
        assert len(numbers) >= 3 and all(isinstance(n, int | float) and n > 0 for n in numbers)
        assert kind != "pie" or "x_title" not in table
        assert made.image.size == (400, 300) and made.question in QUESTIONS["en"]
        pixels = np.asarray(made.image)
        assert (pixels[0] == pixels[0, 0]).all() and (pixels[:, 0] == pixels[0, 0]).all(), "nothing at the borders"
        assert len(made.image.getcolors(1 << 20)) > 20


def test_a_chart_depends_on_its_seed_alone():
    maker = ChartMaker(ChartOptions(size=[400, 300]))
    first, again, other = (maker.make(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.image.tobytes() == again.image.tobytes() and first.answer == again.answer != other.answer


@pytest.mark.filterwarnings("ignore:Glyph")
def test_chinese_charts_need_a_font(monkeypatch):
    with pytest.raises(UserError, match="charts in 'zh': no font has .*--fonts FOLDER"):
        ChartMaker(ChartOptions(languages=["zh"]))

    class Everything:
        def __contains__(self, character):
            return True

    monkeypatch.setattr(fonts, "characters_of", lambda path: Everything())
    made = ChartMaker(ChartOptions(languages=["zh"])).make(np.random.default_rng(0))
    assert made.question in QUESTIONS["zh"] and ast.literal_eval(made.answer)["values"]


@pytest.mark.parametrize("largest", [0.07, 1, 9.99, 10, 123, 98000])
def test_marks_are_round_and_reach_beyond(largest):
    ticks = ticks_to(largest)
    assert 3 <= len(ticks) <= 9 and ticks[0] == 0 and ticks[-2] <= largest * 1.02 <= ticks[-1] * (1 + 1e-9)
    assert float(f"{ticks[1]:.0e}") == pytest.approx(ticks[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["radar"]}, r"kinds is \['radar'\]; choose from bar, barh, line, pie"),
        ({"languages": []}, r"languages is \[\]; choose from en, zh"),
        ({"size": [10, 600]}, "expected 256 to 4096"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ChartOptions(**options)


def test_the_command_line_knows_the_kinds():
    assert make_data.CHARTS == KINDS


def test_without_matplotlib_the_message_names_the_extra():
    script = "import sys; sys.modules['matplotlib'] = None; import mindvlm.datagen.charts"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: charts need matplotlib, which is not installed; run: pip install matplotlib" in done.stderr


def test_the_same_data_come_in_many_styles():
    table = random_table(np.random.default_rng(4), language="en")
    font = fonts.find_fonts().paths[0]
    looks = {
        draw_chart(
            table, "bar", np.random.default_rng(seed), font_path=font, size=(300, 256), is_labelled=True
        ).tobytes()
        for seed in range(8)
    }
    assert len(looks) == 8


@pytest.mark.parametrize("size", [(256, 256), (300, 700), (1000, 300)])
def test_nothing_is_cut_off_in_any_shape(size):
    maker = ChartMaker(ChartOptions(size=list(size)))
    for seed in range(10):
        pixels = np.asarray(maker.make(np.random.default_rng(seed)).image)
        assert pixels.shape == (size[1], size[0], 3)
        assert all((edge == pixels[0, 0]).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
