import numpy as np
import pytest

from mindvlm.datagen.rendered_text import (
    DIFFICULTIES,
    FULL_DIFFICULTY,
    MAX_CHARACTERS,
    MAX_WIDTH,
    Curriculum,
    in_split,
    load_font,
    sample,
)
from mindvlm.processing.images.trimming import Page


def words(text):
    return text.replace("\n", " ").split(" ")


def test_a_sample_is_a_function_of_seed_and_index():
    first, again, other = sample(3, 41), sample(3, 41), sample(4, 41)
    assert first.text == again.text and np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert first.text != other.text


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_samples_stay_within_what_the_model_is_meant_to_read(split):
    for index in range(200):
        one = sample(5, index, split=split)
        lines = one.text.split("\n")
        assert 1 <= len(lines) <= 2 and sum(map(len, lines)) <= MAX_CHARACTERS
        assert all(line and line == line.strip() and line.isascii() and line.isprintable() for line in lines)
        assert one.image.mode == "RGB" and one.image.width <= MAX_WIDTH
        assert Page(one.image).ink_box() is not None


def test_words_of_evaluation_do_not_occur_in_training():
    seen = {word.lower() for index in range(1500) for word in words(sample(1, index).text) if len(word) >= 3}
    held_out = {
        word.lower()
        for index in range(300)
        for word in words(sample(2, index, split="evaluation").text)
        if len(word) >= 3
    }
    assert len(held_out) > 300 and not seen & held_out


def test_the_split_ignores_case_and_leaves_short_words_to_both():
    assert in_split("Hello", "training") == in_split("hELLO", "training") != in_split("hello", "evaluation")
    assert in_split("ab", "training") and in_split("ab", "evaluation")


def test_every_stage_allows_all_of_the_one_before():
    for earlier, later in zip(DIFFICULTIES[1:], DIFFICULTIES[2:], strict=False):
        assert later.min_characters <= earlier.min_characters and later.max_characters >= earlier.max_characters
        assert later.num_fonts >= earlier.num_fonts and later.two_lines >= earlier.two_lines
    assert DIFFICULTIES[-1] == FULL_DIFFICULTY


def test_the_first_stage_is_eight_monospaced_characters():
    texts = [sample(1, index, difficulty=DIFFICULTIES[0]).text for index in range(50)]
    assert {len(text) for text in texts} == {8} and not any(" " in text for text in texts)
    assert load_font("DejaVuSansMono.ttf", 20).getlength("i") == load_font("DejaVuSansMono.ttf", 20).getlength("W")


def test_curriculum_moves_on_when_the_loss_is_low_and_not_before():
    curriculum = Curriculum(threshold=0.5)
    moves = [curriculum.update(0.6) for _ in range(200)]
    assert not any(moves) and curriculum.stage == 0
    steps = next(step for step in range(200) if curriculum.update(0.2))
    assert curriculum.stage == 1 and 1 <= steps < 30
    assert not any(curriculum.update(0.2) for _ in range(49)), "each stage lasts a while"


def test_curriculum_ends_at_the_last_stage():
    curriculum = Curriculum(threshold=0.5)
    for _ in range(2000):
        curriculum.update(0.0)
    assert curriculum.stage == len(DIFFICULTIES) - 1
