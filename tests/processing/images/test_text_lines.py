"""Lines of print are found and laid side by side."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mindvlm.datagen.rendered_text import sample
from mindvlm.processing.images.trimming import Page, TrimConfig, find_lines, lines_side_by_side


def page(*boxes: tuple[int, int, int, int], size=(200, 100), paper="white", ink="black") -> Image.Image:
    image = Image.new("RGB", size, paper)
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=ink)
    return image


@pytest.mark.parametrize(
    ("runs", "lines"),
    [
        ([], []),
        ([(5, 25)], [(5, 25)]),
        ([(5, 25), (30, 50)], [(5, 25), (30, 50)]),
        # the dot of an i belongs to the line below it, a full stop to the one above
        ([(5, 8), (10, 25)], [(5, 25)]),
        ([(5, 25), (27, 30)], [(5, 30)]),
        ([(5, 25), (26, 28), (40, 60)], [(5, 28), (40, 60)]),
        # nothing but low runs is one line, such as ':' or '='
        ([(5, 8), (12, 15)], [(5, 15)]),
        # three lines
        ([(5, 20), (25, 40), (45, 60)], [(5, 20), (25, 40), (45, 60)]),
    ],
)
def test_runs_of_ink_become_lines(runs, lines):
    mask = np.zeros((70, 40), dtype=bool)
    for top, bottom in runs:
        mask[top:bottom, 3:30] = True

    assert find_lines(mask) == lines


def test_one_line_stays_as_it_is():
    image = page((10, 10, 100, 40))

    assert lines_side_by_side(Page(image)) is image


def test_blank_paper_stays_as_it_is():
    image = page()

    assert lines_side_by_side(Page(image)) is image


def test_two_lines_stand_beside_each_other_with_a_rule_between():
    image = page((20, 10, 80, 30), (50, 50, 150, 90), paper=(240, 250, 230), ink=(30, 20, 60))

    row = lines_side_by_side(Page(image))

    gap, rule = 10, 12
    assert row.size == (60 + 100 + 2 * gap + rule, 40)
    columns = np.asarray(row)[20]
    assert (columns[30] == (30, 20, 60)).all()
    assert (columns[60 + gap // 2] == (240, 250, 230)).all()
    assert (columns[60 + gap + rule // 2] == (30, 20, 60)).all()
    assert (columns[60 + gap + rule + gap // 2] == (240, 250, 230)).all()
    assert (columns[-1] == (30, 20, 60)).all()


def test_the_lines_of_rendered_text_are_found():
    wrong = 0
    for index in range(200):
        shown = sample(3, index, split="evaluation")
        wrong += len(find_lines(Page(shown.image).is_ink)) != shown.text.count("\n") + 1

    assert wrong <= 2


def test_the_option_of_the_config_acts():
    image = page((20, 10, 80, 30), (50, 50, 150, 90))

    assert TrimConfig().apply(image).size == (130, 80)
    assert TrimConfig(lines="side_by_side").apply(image).size == (192, 40)
