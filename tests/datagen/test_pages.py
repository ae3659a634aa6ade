import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from mindvlm.core.errors import UserError
from mindvlm.datagen import fonts
from mindvlm.datagen.fonts import characters_of, find_fonts, is_chinese
from mindvlm.datagen.line_breaking import break_lines
from mindvlm.datagen.pages import CHINESE_QUESTIONS, ENGLISH_QUESTIONS, PageMaker, PageOptions
from mindvlm.datagen.text_source import TextSource

ENGLISH = "The harbour opened early, and nobody asked why (it was 7:15).\nA second paragraph; short one."
words = st.lists(st.text("abcXYZ019.,-文字中国，。（）《》", min_size=1, max_size=12), min_size=1, max_size=25)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "a book.txt"
    path.write_text("\n".join(f"Line {i} of the book says {ENGLISH}" for i in range(200)))
    return path


def rng(*seed):
    return np.random.default_rng(seed)


@given(words, st.integers(30, 400), st.sampled_from([0, 20]))
def test_lines_fit_and_make_up_the_paragraph(parts, width, indent):
    paragraph = " ".join(parts)

    def measure(text):
        return sum(10 if c > "\u2000" else 5 for c in text)

    lines = break_lines(paragraph, width, indent, measure)
    joined = lines[0].text + "".join(line.joint + line.text for line in lines[1:])
    assert joined == paragraph
    for i, line in enumerate(lines):
        assert measure(line.text) <= width - (indent if i == 0 else 0) or len(line.units) == 1
    assert [line.opens for line in lines] == [True] + [False] * (len(lines) - 1)
    assert [line.closes for line in lines] == [False] * (len(lines) - 1) + [True]


def test_chinese_breaks_anywhere_but_before_closing_marks():
    lines = break_lines("他说：“你好，世界。”然后走了。", 40, 0, lambda text: 10 * len(text))
    assert len(lines) > 3
    assert not any(re.match("[，。：”]", line.text) or re.search("“$", line.text) for line in lines)


def test_coverage_is_what_pillow_draws():
    path = find_fonts().paths[0]
    covered, font = characters_of(path), ImageFont.truetype(path, 24)
    absent = bytes(font.getmask("\U000fffff"))
    for character in "AzéЖ9€中文字あ한":
        assert (character in covered) == (bytes(font.getmask(character)) != absent), character


def test_a_page_depends_on_its_seed_alone(book):
    maker = PageMaker(PageOptions(text=[str(book)]))
    first, again, other = maker.make(rng(1, 2)), maker.make(rng(1, 2)), maker.make(rng(1, 3))
    assert first.image.tobytes() == again.image.tobytes() and first.answer == again.answer
    assert first.answer != other.answer and first.image.size == (1000, 1414)
    assert first.question in ENGLISH_QUESTIONS


@pytest.mark.parametrize("columns", [[1], [3]])
def test_the_answer_is_a_stretch_of_the_text_and_fills_the_page(book, columns):
    source = " ".join(book.read_text().split() * 2)
    maker = PageMaker(PageOptions(text=[str(book)], columns=columns))
    for number in range(6):
        made = maker.make(rng(7, number))
        assert " ".join(made.answer.split()) in source
        ink = np.asarray(made.image.convert("L")) < 128
        assert ink[200:1200].any(axis=1).mean() > 0.3, "lines from top to bottom"
        assert ink[:, -20:].sum() == ink[:, :20].sum() == 0, "nothing in the margins"
        assert len(made.answer) > 500


def test_lines_of_the_page_can_be_kept(book):
    joined, kept = (
        PageMaker(PageOptions(text=[str(book)], line_breaks=breaks)).make(rng(5)) for breaks in ("join", "keep")
    )
    assert joined.image.tobytes() == kept.image.tobytes()
    assert kept.answer.count("\n") > joined.answer.count("\n") and kept.answer.split() == joined.answer.split()


def test_few_characters_can_be_asked_for(book):
    maker = PageMaker(PageOptions(text=[str(book)], size=[400, 200], max_characters=60, columns=[1]))
    for number in range(8):
        assert 1 <= len(maker.make(rng(number)).answer) <= 61


def test_hard_wrapped_files_have_paragraphs_between_blank_lines(tmp_path):
    line = "about sixty characters of plain text in every single line ok"
    (tmp_path / "wrapped.txt").write_text("\n\n".join("\n".join([line] * 4) for _ in range(50)))
    (tmp_path / "lines.txt").write_text("\n".join([line] * 200))
    assert set(TextSource([tmp_path / "wrapped.txt"]).passage(rng(1), 900)[1:-1]) == {" ".join([line] * 4)}
    assert set(TextSource([tmp_path / "lines.txt"]).passage(rng(1), 900)[1:-1]) == {line}


@given(st.integers(0, 1000), st.text(min_size=1, max_size=300).filter(lambda text: text.strip("\x00").strip()))
def test_any_text_gives_passages(tmp_path_factory, seed, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        source = TextSource([path])
    except UserError as error:
        assert "no text in it" in str(error)
        return
    passage = source.passage(rng(seed), 100)
    assert all(line.strip() == line and line and "\n" not in line for line in passage)


def test_a_text_that_no_font_covers_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "zh.txt").write_text("中文字体不在这里。" * 20)
    with pytest.raises(UserError, match="zh.txt: no font has '.' .U\\+....\\); give a folder .*--fonts FOLDER"):
        PageMaker(PageOptions(text=[str(tmp_path / "zh.txt")]))
    monkeypatch.setattr(fonts, "characters_of", lambda path: frozenset("中文字体不在这里。"))
    made = PageMaker(PageOptions(text=[str(tmp_path / "zh.txt")])).make(rng(3))
    assert set(made.answer) <= set("中文字体不在这里。\n") and is_chinese(made.answer)
    assert made.question in CHINESE_QUESTIONS + ENGLISH_QUESTIONS


def test_characters_without_glyph_are_left_out(tmp_path):
    (tmp_path / "mixed.txt").write_text(("plain words without end " * 20 + "中\n") * 30)
    assert "中" not in PageMaker(PageOptions(text=[str(tmp_path / "mixed.txt")])).make(rng(1)).answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": [10, 500]}, "size 10 x 500: expected 64 to 8192"),
        ({"font_sizes": [30, 20]}, "font_sizes must rise"),
        ({"columns": [0]}, "columns must be at least 1"),
        ({"columns": [30]}, "too narrow for 30 columns"),
        ({"fonts": "nowhere"}, "fonts folder nowhere: not found"),
    ],
)
def test_impossible_options_are_named(book, options, message):
    with pytest.raises(UserError, match=message):
        PageMaker(PageOptions(text=[str(book)], **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "no text in it"), (b"good\n\xff\xfe bad", "line 2: not UTF-8")],
)
def test_unusable_texts_are_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TextSource([path])


def test_fonts_folders_are_searched(tmp_path):
    with pytest.raises(UserError, match="holds no .ttf, .otf, .ttc file that can be used"):
        find_fonts(tmp_path)
    (tmp_path / "deep").mkdir()
    shipped = find_fonts().paths
    (tmp_path / "deep" / "Own.TTF").write_bytes(open(shipped[1], "rb").read())
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert find_fonts(tmp_path).paths == [*shipped, str(tmp_path / "deep" / "Own.TTF")]
