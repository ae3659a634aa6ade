"""Makers of training data from drawn scenes: captions, and several questions about each picture."""

import re
from dataclasses import dataclass

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.dataset import MadeSample, pick
from mindvlm.datagen.scene_questions import KINDS, SHORT_ANSWER, TRAINING_KINDS, SceneQuestion, choose, statements
from mindvlm.datagen.scenes import Scene, description, draw_scene, random_scene

VERSION = 1
"""Raised when the same seed gives another scene or question than before."""
DESCRIBE = "Describe the image."
# shares of pictures that are described first, and of first questions that ask for a short answer
DESCRIBED_SHARE, SHORT_SHARE = 0.1, 0.5
LISTED_SHARE, NUM_STATEMENTS = 0.5, 6
EDGES = 32, 1024
# scenes that are drawn until one has enough questions, and questions that are drawn about each
NUM_SCENES, NUM_DRAWS = 200, 1000


@dataclass(kw_only=True)
class SceneOptions:
    """The size of pictures in pixels, and the number and kinds of questions about each.

    Attributes:
        kinds: names of `TRAINING_KINDS`; "counting=3" is drawn three times as often as "colour". None: `KINDS`, equally
            often.

    Raises:
        UserError: a value is out of range, or a kind is unknown.
    """

    size: int = 96
    num_questions: int = 6
    kinds: list[str] | None = None

    def __post_init__(self) -> None:
        if not EDGES[0] <= self.size <= EDGES[1]:
            raise UserError(f"--size is {self.size}; expected {EDGES[0]} to {EDGES[1]} pixels")
        if not 1 <= self.num_questions <= 32:
            raise UserError(f"--num_questions is {self.num_questions}; expected 1 to 32")
        self.drawn_kinds()

    def drawn_kinds(self) -> list[str]:
        """Returns the kinds to draw from, each as many times as it weighs."""
        drawn: list[str] = []
        for entry in self.kinds or KINDS:
            kind, _, weight = entry.partition("=")
            if kind not in TRAINING_KINDS or not re.fullmatch("[1-9][0-9]?", weight or "1"):
                known = ", ".join(TRAINING_KINDS)
                raise UserError(
                    f"--kinds has {entry!r}; expected one of {known}, or such a kind and its weight, kind=1 to 99"
                )
            drawn += [kind] * int(weight or 1)
        return drawn


class CaptionMaker:
    """Makes scenes with a caption: a list of the shapes, or true sentences in random order.

    A sentence that names a shape first teaches a model to find it, as an answer to a question needs it.
    """

    version = VERSION

    def __init__(self, options: SceneOptions):
        if options.kinds:
            raise UserError("--kinds is about questions; remove it with --content captions")
        self.options = options

    def make(self, rng: np.random.Generator) -> MadeSample:
        """Makes a scene, which depends on the options and `rng` alone."""
        scene = random_scene(rng)
        is_described = rng.random() < LISTED_SHARE
        caption = description(scene) if is_described else statements(rng, scene, NUM_STATEMENTS)
        return MadeSample(draw_scene(scene, self.options.size), DESCRIBE, caption)


class QuestionMaker:
    """Makes scenes with several questions each, whose kinds are as frequent as the options say."""

    version = VERSION

    def __init__(self, options: SceneOptions):
        self.options = options
        self.kinds = options.drawn_kinds()
        # raises before the first picture
        self.draw(np.random.default_rng(0))

    def make(self, rng: np.random.Generator) -> MadeSample:
        """Makes a scene, which depends on the options and `rng` alone."""
        scene, questions = self.draw(rng)
        turns = [(question.text, question.answer) for question in questions]
        if rng.random() < SHORT_SHARE:
            turns[0] = turns[0][0] + SHORT_ANSWER, turns[0][1]
        elif rng.random() < DESCRIBED_SHARE / (1 - SHORT_SHARE):
            turns[0] = DESCRIBE, description(scene)
        (question, answer), *more = turns
        return MadeSample(draw_scene(scene, self.options.size), question, answer, tuple(more))

    def draw(self, rng: np.random.Generator) -> tuple[Scene, list[SceneQuestion]]:
        """Returns the next scene about which there are enough different questions, and these.

        Raises:
            UserError: there is none.
        """
        for _ in range(NUM_SCENES):
            scene, questions = random_scene(rng), {}
            for _ in range(NUM_DRAWS):
                question = choose(rng, scene, pick(rng, self.kinds))
                if question:
                    questions[question.text] = question
                if len(questions) == self.options.num_questions:
                    return scene, list(questions.values())
        kinds = " ".join(self.options.kinds or KINDS)
        raise UserError(
            f"--num_questions is {self.options.num_questions}, and none of {NUM_SCENES} scenes has as many of "
            f"--kinds {kinds}; lower the number or name more kinds"
        )
