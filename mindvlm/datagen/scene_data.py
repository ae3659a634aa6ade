"""Makers of training data from drawn scenes: captions, and several questions about each picture."""

from dataclasses import dataclass

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.dataset import MadeSample, pick
from mindvlm.datagen.scene_questions import KINDS, SHORT_ANSWER, SceneQuestion, choose, statements
from mindvlm.datagen.scenes import description, draw_scene, random_scene

VERSION = 1
"""Raised when the same seed gives another scene or question than before."""
DESCRIBE = "Describe the image."
# shares of pictures that are described first, and of first questions that ask for a short answer
DESCRIBED_SHARE, SHORT_SHARE = 0.1, 0.5
LISTED_SHARE, NUM_STATEMENTS = 0.5, 6
EDGES = 32, 1024


@dataclass(kw_only=True)
class SceneOptions:
    """The size of pictures in pixels and the number of questions about each.

    Raises:
        UserError: a value is out of range.
    """

    size: int = 96
    num_questions: int = 6

    def __post_init__(self) -> None:
        if not EDGES[0] <= self.size <= EDGES[1]:
            raise UserError(f"--size is {self.size}; expected {EDGES[0]} to {EDGES[1]} pixels")
        if not 1 <= self.num_questions <= 32:
            raise UserError(f"--num_questions is {self.num_questions}; expected 1 to 32")


class CaptionMaker:
    """Makes scenes with a caption: a list of the shapes, or true sentences in random order.

    A sentence that names a shape first teaches a model to find it, as an answer to a question needs it.
    """

    version = VERSION

    def __init__(self, options: SceneOptions):
        self.options = options

    def make(self, rng: np.random.Generator) -> MadeSample:
        """Makes a scene, which depends on the options and `rng` alone."""
        scene = random_scene(rng)
        is_described = rng.random() < LISTED_SHARE
        caption = description(scene) if is_described else statements(rng, scene, NUM_STATEMENTS)
        return MadeSample(draw_scene(scene, self.options.size), DESCRIBE, caption)


class QuestionMaker:
    """Makes scenes with several questions each, all kinds of which are equally frequent."""

    version = VERSION

    def __init__(self, options: SceneOptions):
        self.options = options

    def make(self, rng: np.random.Generator) -> MadeSample:
        """Makes a scene, which depends on the options and `rng` alone."""
        scene = random_scene(rng)
        questions: dict[str, SceneQuestion] = {}
        while len(questions) < self.options.num_questions:
            question = choose(rng, scene, pick(rng, list(KINDS)))
            if question:
                questions[question.text] = question
        turns = [(question.text, question.answer) for question in questions.values()]
        if rng.random() < SHORT_SHARE:
            turns[0] = turns[0][0] + SHORT_ANSWER, turns[0][1]
        elif rng.random() < DESCRIBED_SHARE / (1 - SHORT_SHARE):
            turns[0] = DESCRIBE, description(scene)
        (question, answer), *more = turns
        return MadeSample(draw_scene(scene, self.options.size), question, answer, tuple(more))
