"""TinyLLaVA-nano, the shipped model, answers questions about scenes that it has never seen."""

import numpy as np
import pytest

import mindvlm
from mindvlm.datagen.scene_questions import SHORT_ANSWER, balanced_question
from mindvlm.datagen.scenes import Scene, Thing, draw_scene
from tests.test_readme import ROOT

CONFIG = ROOT / "configs/tinyllava/tinyllava_nano.yaml"
FOLDER = ROOT / "examples/tinyllava_nano"
SEED = 20261130


@pytest.fixture(scope="module")
def model():
    return mindvlm.load(CONFIG, mode="pynative")


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8 * 2**20


@pytest.mark.parametrize("suffix", ["", SHORT_ANSWER])
def test_it_knows_colours_shapes_and_what_is_there(model, suffix):
    rng, pictures, questions = np.random.default_rng(SEED), [], []
    for number in range(48):
        scene, question = balanced_question(rng, ("colour", "shape", "existence")[number % 3], number // 3)
        pictures.append(draw_scene(scene, 96))
        questions.append(question)

    answers = model.generate([f"{one.text}{suffix}" for one in questions], pictures, max_new_tokens=8)

    right = sum(str(answer) == one.answer for answer, one in zip(answers, questions, strict=True))
    assert right >= 43, f"{right} of {len(questions)}"


@pytest.mark.parametrize(
    ("kind", "least"),
    [("position", 36), ("relation", 36), ("comparison", 36), ("counting", 30)],
    ids=lambda value: value,
)
def test_it_places_and_counts(model, kind, least):
    rng = np.random.default_rng(SEED)
    asked = [balanced_question(rng, kind, number) for number in range(40)]

    pictures = [draw_scene(scene, 96) for scene, _ in asked]
    answers = model.generate([one.text for _, one in asked], pictures, max_new_tokens=8)

    right = sum(str(answer) == one.answer for answer, (_, one) in zip(answers, asked, strict=True))
    assert right >= least, f"{right} of {len(asked)}"


def test_a_conversation_about_a_picture_of_another_size(model):
    things = Thing("circle", "red", "large", 0, 0.17, 0.17, 0.13), Thing("square", "blue", "large", 8, 0.83, 0.83, 0.13)
    talk = mindvlm.Conversation(model)

    answers = [str(talk.ask("What color is the circle?", images=draw_scene(Scene(things), 300)))]
    answers += [str(talk.ask(text)) for text in ("What shape is the blue object?", "Is there a cross in the image?")]

    assert answers == ["red", "square", "no"]
