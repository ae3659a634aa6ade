"""Drawn scenes: the answers are true of the pictures, and nothing but the picture tells them."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from mindvlm.datagen.scene_data import CaptionMaker, QuestionMaker, SceneOptions
from mindvlm.datagen.scene_questions import KINDS, SHORT_ANSWER, TRAINING_KINDS, balanced_question, choose, templates
from mindvlm.datagen.scenes import COLOURS, GRID, OUTLINE, PLACES, SHAPES, WORDS, description, draw_scene, random_scene
from mindvlm.processing.text.tokenizer_files import open_tokenizer
from mindvlm.tools import make_data
from mindvlm.training.datasets.registry import read_registry
from tests.test_readme import ROOT

EDGE = 240
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")


def seen_things(pixels: np.ndarray) -> list[dict]:
    """Finds the shapes in a picture by the colours of its pixels, one in each cell."""
    found, cell = [], EDGE // GRID
    for place in range(GRID * GRID):
        top, left = place // GRID * cell, place % GRID * cell
        part = pixels[top : top + cell, left : left + cell]
        for colour, rgb in COLOURS.items():
            mask = (part == rgb).all(-1)
            # the last line of a shape in the next cell
            if mask.sum() < 50:
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            widths = inner.sum(1) / inner.shape[1]
            # a triangle grows downwards, the arms of a cross are in the middle
            shape = "square" if widths.min() > 0.9 else "circle"
            if widths[-3:].mean() > 0.9 > 0.2 > widths[:3].mean():
                shape = "triangle"
            elif widths[len(widths) // 4] < 0.4 and widths[-len(widths) // 4] < 0.4:
                shape = "cross"
            x, y = left + (columns[0] + columns[-1]) / 2, top + (rows[0] + rows[-1]) / 2
            size = "small" if len(columns) < 0.19 * EDGE else "large"
            found.append({"colour": colour, "shape": shape, "size": size, "x": x, "y": y, "cell": place})
    return found


def phrase(thing: dict) -> str:
    return f"a {thing['size']} {thing['colour']} {thing['shape']} at the {PLACES[thing['cell']]}"


def named(things: list[dict], name: str) -> list[dict]:
    """Returns the shapes that have all attributes of a name."""
    words = [re.sub(r"(?<=cross)es$|s$", "", word) if word != "cross" else word for word in name.split()]
    return [one for one in things if all(word in (*one.values(), "object") for word in words)]


def true_answer(question: str, things: list[dict], word: str) -> str:
    """Answers a question from what is seen in the picture."""

    def only(name: str) -> dict:
        (one,) = named(things, name)
        return one

    def yes(truth: bool) -> str:
        return "yes" if truth else "no"

    sides = {"left": lambda a, b: a["x"] < b, "right": lambda a, b: a["x"] > b}
    sides |= {"top": lambda a, b: a["y"] < b, "bottom": lambda a, b: a["y"] > b}
    rules = {
        r"What color is the (.+)\?": lambda name: only(name)["colour"],
        r"What shape is the (.+)\?": lambda name: only(name)["shape"],
        r"Is the (.+) small or large\?": lambda name: only(name)["size"],
        r"Is the (.+) on the left or on the right\?": lambda name: "left" if only(name)["x"] < EDGE / 2 else "right",
        r"Is the (.+) at the top or at the bottom\?": lambda name: "top" if only(name)["y"] < EDGE / 2 else "bottom",
        r"Is the word (\w+) written in the image\?": lambda text: yes(text == word),
        r"Is the (.+) (?:on|at) the (\w+) (?:side )?of the image\?": lambda name, side: yes(
            sides[side](only(name), EDGE / 2)
        ),
        r"Is the (.+) to the left or to the right of the (.+)\?": lambda name, other: (
            "left" if only(name)["x"] < only(other)["x"] else "right"
        ),
        r"Is the (.+) above or below the (.+)\?": lambda name, other: (
            "above" if only(name)["y"] < only(other)["y"] else "below"
        ),
        r"Is the (.+) to the (left|right) of the (.+)\?": lambda name, side, other: yes(
            sides[side](only(name), only(other)["x"])
        ),
        r"Is the (.+) (above|below) the (.+)\?": lambda name, side, other: yes(
            (only(name)["y"] < only(other)["y"]) == (side == "above")
        ),
        r"Is the (.+) an? (\w+)\?": lambda name, shape: yes(only(name)["shape"] == shape),
        r"Is the (.+) (\w+)\?": lambda name, colour: yes(only(name)["colour"] == colour),
        r"Is there an? (.+) in the image\?": lambda name: yes(bool(named(things, name))),
        r"How many (.+) are there\?": lambda name: str(len(named(things, name))),
        r"Are there (\w+) (.+) in the image\?": lambda number, name: yes(
            len(named(things, name)) == NUMBER_WORDS.index(number)
        ),
        r"What word is written in the image\?": lambda: word,
        r"Describe the (.+)\.": lambda name: f"{phrase(only(name))}.",
    }
    for rule, answer in rules.items():
        if found := re.fullmatch(rule, question):
            return answer(*found.groups())
    raise AssertionError(question)


def test_all_answers_and_captions_are_true_of_the_picture():
    rng, asked = np.random.default_rng(5), Counter()
    for _ in range(80):
        scene = random_scene(rng)
        pixels = np.asarray(draw_scene(scene, EDGE))
        things = seen_things(pixels)
        for kind, ask in TRAINING_KINDS.items():
            questions = list(ask(scene))
            for place in rng.permutation(len(questions))[:12].tolist():
                question = questions[place]
                assert question.answer == true_answer(question.text, things, scene.word), question
                asked[kind, question.template] += 1
        assert description(scene).startswith(", ".join(map(phrase, things)))
        line = pixels[scene.word_line * EDGE // GRID : (scene.word_line + 1) * EDGE // GRID]
        assert not scene.word or (line == OUTLINE).all(-1).sum() > 100
    assert {key for key in asked} == {(kind, template) for kind in TRAINING_KINDS for template in templates(kind)}


def test_a_scene_depends_on_its_seed_alone():
    def made(seed: int, maker=QuestionMaker):
        sample = maker(SceneOptions()).make(np.random.default_rng(seed))
        return sample.image.tobytes(), sample.question, sample.answer, sample.more

    assert made(1) == made(1) != made(2)
    assert made(1, CaptionMaker)[1] == "Describe the image." and made(1, CaptionMaker)[3] == ()
    assert len(made(1)[3]) == 5


def test_answers_are_balanced_within_each_template():
    rng = np.random.default_rng(0)
    for kind in (*KINDS, "comparison"):
        known = templates(kind)
        num = len(known) * int(np.lcm.reduce([len(answers) for answers in known.values()]))
        counts = Counter()
        for number in range(min(num, 240)):
            _, question = balanced_question(rng, kind, number)
            counts[question.template, question.answer] += 1
        for template, answers in known.items():
            found = [counts[template, answer] for answer in answers]
            assert max(found) - min(found) <= 1 and min(found) > 0, (kind, template, found)


def test_a_guess_from_the_text_of_a_question_is_no_better_than_chance():
    """Words of the question, such as a number or a place, do not tell yes from no."""
    rng, words, total = np.random.default_rng(3), {}, Counter()
    for number in range(3000):
        kind = list(KINDS)[number % len(KINDS)]
        question = choose(rng, random_scene(rng), kind)
        if question and question.answer in ("yes", "no"):
            for word in set(question.text.split()):
                words.setdefault((kind, word), Counter())[question.answer] += 1
            total[kind] += 1
    assert set(total) == set(KINDS) - {"size"}
    for key, counts in words.items():
        if counts.total() >= 60:
            share, slack = counts["yes"] / counts.total(), 4 * 0.5 / counts.total() ** 0.5
            assert abs(share - 0.5) < slack, (key, counts)


def test_the_shipped_vocabulary_has_every_word():
    tokenizer = open_tokenizer(ROOT / "examples/tinyllava_nano")
    rng, texts = np.random.default_rng(9), [f"\n{SHORT_ANSWER.strip()}"]
    for _ in range(100):
        scene = random_scene(rng)
        texts.append(" " + description(scene))
        for kind in (*KINDS, "comparison"):
            texts += [
                text
                for question in TRAINING_KINDS[kind](scene)
                for text in ("\n" + question.text, " " + question.answer)
            ]
    words = {word for text in texts for word in re.findall(r"\n| ?\w+|[^\w\s]", text)}
    assert {" " + word for word in (*COLOURS, *SHAPES, *WORDS)} <= words
    assert {word for word in words if len(tokenizer.encode(word)) != 1} == set()
    for text in texts[:50]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("naïve 图 🙂")) == "naïve 图 🙂"


def test_training_data_have_several_turns_about_a_picture(tmp_path):
    arguments = ["scenes", "--output", str(tmp_path / "q"), "--num_images", "20", "--num_questions", "4"]
    assert make_data.main([*arguments, "--workers", "1"]) == 0

    records = json.loads((tmp_path / "q/annotations.json").read_text())
    firsts = [record["conversations"][0]["value"] for record in records]
    assert all(len(record["conversations"]) == 8 for record in records)
    assert all(value.startswith("<image>\n") for value in firsts)
    assert 4 <= sum(value.endswith(SHORT_ANSWER) for value in firsts) <= 16
    assert read_registry(tmp_path / "q/registry.yaml")["q"].annotations == str(tmp_path / "q/annotations.json")


def test_kinds_of_questions_are_as_frequent_as_they_weigh():
    def asked(kinds):
        maker, texts = QuestionMaker(SceneOptions(kinds=kinds)), []
        for number in range(150):
            sample = maker.make(np.random.default_rng(number))
            texts += [sample.question, *(text for text, _ in sample.more)]
        return texts

    # fewer different questions are about a shape, so that more of those drawn are dropped
    for kinds, low, high in ((["shape=3", "existence"], 0.2, 0.35), (["shape", "existence=3"], 0.65, 0.8)):
        texts = asked(kinds)
        assert low < sum("in the image" in text for text in texts) / len(texts) < high
    assert all(" or " in text for text in asked(["comparison"]) if text != "Describe the image.")
    assert asked(list(KINDS)) == asked(None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "8"], ("--size", "8", "32 to 1024")),
        (["--num_questions", "0"], ("--num_questions", "1 to 32")),
        (["--kinds", "counts"], ("--kinds", "'counts'", "counting")),
        (["--kinds", "text=0"], ("--kinds", "'text=0'", "1 to 99")),
        (["--kinds", "size", "--num_questions", "32"], ("--num_questions", "32", "size")),
        (["--kinds", "size", "--content", "captions"], ("--kinds", "captions")),
    ],
)
def test_wrong_sizes_are_one_line(tmp_path, capsys, options, words):
    assert make_data.main(["scenes", "--output", str(tmp_path / "x"), "--num_images", "1", *options]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)
