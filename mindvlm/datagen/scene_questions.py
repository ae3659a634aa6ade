"""Questions about drawn scenes, with their answers, in the style of GQA, POPE, MME and VQA.

For every question there are scenes with each of its answers, and `choose` draws the answer before the question: a model
that does not see the picture cannot tell them apart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from mindvlm.datagen.dataset import pick
from mindvlm.datagen.scenes import COLOURS, SHAPES, WORDS, Scene, Thing, describe, random_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five")
YES_NO = ("yes", "no")
# two shapes are beside or above each other if their centres are at least this far apart
LEAST_DISTANCE = 0.15
# scenes in which the answers to a template are looked for
NUM_SEARCHED = 1000
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene.

    Attributes:
        kind: one of `TRAINING_KINDS`.
        template: of the text.
        detail: what a wrong answer would take for true: of existence, one of `ABSENT`.
        statement: question and answer as one sentence; "" for most questions of yes or no.
    """

    kind: str
    template: str
    text: str
    answer: str
    detail: str = ""
    statement: str = ""


ABSENT = ("random", "popular", "adversarial")
"""Objects that are not there: neither their colour nor their shape is, one of both is, or each is on another object."""

Questions = Iterator[SceneQuestion]


def names(scene: Scene, thing: Thing, *, hidden: Sequence[str] = ()) -> Iterator[str]:
    """Yields the names of a shape that no other shape of the scene has, without its hidden attributes."""
    for parts in (("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour")):
        same = [one for one in scene.things if all(getattr(one, part) == getattr(thing, part) for part in parts)]
        if len(same) == 1 and not set(parts) & set(hidden):
            name = " ".join(getattr(thing, part) for part in parts)
            yield name if "shape" in parts else f"{name} object"


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def yes_or_no(
    kind: str, template: str, text: str, is_true: bool, detail: str = "", statement: str = ""
) -> SceneQuestion:
    return SceneQuestion(kind, template, text, YES_NO[not is_true], detail, statement)


def colour_questions(scene: Scene) -> Questions:
    for thing in scene.things:
        for name in names(scene, thing, hidden=["colour"]):
            statement = f"The {name} is {thing.colour}."
            yield SceneQuestion("colour", "what", f"What color is the {name}?", thing.colour, "", statement)
            for colour in COLOURS:
                yield yes_or_no("colour", "is", f"Is the {name} {colour}?", colour == thing.colour)


def shape_questions(scene: Scene) -> Questions:
    for thing in scene.things:
        for name in names(scene, thing, hidden=["shape"]):
            statement = f"The {name} is a {thing.shape}."
            yield SceneQuestion("shape", "what", f"What shape is the {name}?", thing.shape, "", statement)
            for shape in SHAPES:
                yield yes_or_no("shape", "is", f"Is the {name} a {shape}?", shape == thing.shape)


def size_questions(scene: Scene) -> Questions:
    for thing in scene.things:
        for name in names(scene, thing, hidden=["size"]):
            statement = f"The {name} is {thing.size}."
            yield SceneQuestion("size", "or", f"Is the {name} small or large?", thing.size, "", statement)


def position_questions(scene: Scene) -> Questions:
    for thing in scene.things:
        column, line = side(thing.x, "left", "right"), side(thing.y, "top", "bottom")
        for name in names(scene, thing):
            if column:
                text, statement = f"Is the {name} on the left or on the right?", f"The {name} is on the {column}."
                yield SceneQuestion("position", "left or right", text, column, "", statement)
                for place in ("left", "right"):
                    text = f"Is the {name} on the {place} side of the image?"
                    yield yes_or_no("position", "is on the side", text, place == column)
            if line:
                text, statement = f"Is the {name} at the top or at the bottom?", f"The {name} is at the {line}."
                yield SceneQuestion("position", "top or bottom", text, line, "", statement)
                for place in ("top", "bottom"):
                    text = f"Is the {name} at the {place} of the image?"
                    yield yes_or_no("position", "is at the end", text, place == line)


def side(coordinate: float, low: str, high: str) -> str:
    """Returns the third of the picture that a coordinate is in: `low`, `high`, or "" for the middle."""
    return low if coordinate < 1 / 3 else high if coordinate > 2 / 3 else ""


def existence_questions(scene: Scene) -> Questions:
    colours, shapes = {one.colour for one in scene.things}, {one.shape for one in scene.things}
    pairs = {(one.colour, one.shape) for one in scene.things}
    names = {f"{colour} {shape}": ("both", (colour, shape) in pairs) for colour in COLOURS for shape in SHAPES}
    names |= {f"{colour} object": ("colour", colour in colours) for colour in COLOURS}
    names |= {shape: ("shape", shape in shapes) for shape in SHAPES}
    for name, (template, is_there) in names.items():
        colour, _, shape = name.partition(" ")
        detail = ABSENT[(colour in colours) + (shape in shapes)] if template == "both" and not is_there else ""
        statement = f"There is {article(name) if is_there else f'no {name}'}."
        text = f"Is there {article(name)} in the image?"
        yield yes_or_no("existence", template, text, is_there, detail, statement)


def counting_questions(scene: Scene) -> Questions:
    """Yields "Are there N ...?" for an N that some are and others are not; else "no" would be likelier than "yes"."""
    shapes = {f"{shape}{'e' * (shape == 'cross')}s": has(scene, shape=shape) for shape in SHAPES}
    colours = {f"{colour} objects": has(scene, colour=colour) for colour in COLOURS}
    for kind, counts in (("all", {"objects": len(scene.things)}), ("shape", shapes), ("colour", colours)):
        present = {name: count for name, count in counts.items() if count}
        for name, count in present.items():
            text, statement = f"How many {name} are there?", f"The number of {name} is {count}."
            yield SceneQuestion("counting", f"how many, {kind}", text, str(count), "", statement)
            for number in set(present.values()) - {1} if len(set(present.values())) > 1 else ():
                text = f"Are there {NUMBERS[number]} {name} in the image?"
                yield yes_or_no("counting", f"are there, {kind}", text, number == count)


def has(scene: Scene, **wanted: str) -> int:
    """Returns the number of shapes with these attributes."""
    return sum(all(getattr(one, key) == value for key, value in wanted.items()) for one in scene.things)


def relation_questions(scene: Scene) -> Questions:
    for name, reference, across, down in pairs(scene):
        if abs(across) >= LEAST_DISTANCE:
            for place, is_true in (("left", across > 0), ("right", across < 0)):
                text = f"Is the {name} to the {place} of the {reference}?"
                statement = f"The {name} is to the {place} of the {reference}." if is_true else ""
                yield yes_or_no("relation", "beside", text, is_true, "", statement)
        if abs(down) >= LEAST_DISTANCE:
            for place, is_true in (("above", down > 0), ("below", down < 0)):
                text = f"Is the {name} {place} the {reference}?"
                statement = f"The {name} is {place} the {reference}." if is_true else ""
                yield yes_or_no("relation", "above", text, is_true, "", statement)


def comparison_questions(scene: Scene) -> Questions:
    """Yields relations as a choice between two places.

    Either place alone makes one answer likelier. Of a yes-or-no question that is so only together with the place asked
    for, which a model learns late or never.
    """
    for name, reference, across, down in pairs(scene):
        if abs(across) >= LEAST_DISTANCE:
            text = f"Is the {name} to the left or to the right of the {reference}?"
            yield SceneQuestion("comparison", "left or right", text, "left" if across > 0 else "right")
        if abs(down) >= LEAST_DISTANCE:
            text = f"Is the {name} above or below the {reference}?"
            yield SceneQuestion("comparison", "above or below", text, "above" if down > 0 else "below")


def pairs(scene: Scene) -> Iterator[tuple[str, str, float, float]]:
    """Yields the names of two shapes, and how far the second is to the right of the first and below it."""
    for first, second in combinations(scene.things, 2):
        for one, other in ((first, second), (second, first)):
            for name, reference in zip(names(scene, one), names(scene, other), strict=False):
                yield name, reference, other.x - one.x, other.y - one.y


def description_questions(scene: Scene) -> Questions:
    """Yields requests to describe a shape, whose answers say where it is: one of nine places, not of two."""
    for thing in scene.things:
        for name in names(scene, thing):
            yield SceneQuestion("description", "describe", f"Describe the {name}.", f"{describe(thing)}.")


def text_questions(scene: Scene) -> Questions:
    if scene.word:
        statement = f"The word is {scene.word}."
        yield SceneQuestion("text", "what", "What word is written in the image?", scene.word, "", statement)
        for word in WORDS:
            yield yes_or_no("text", "is", f"Is the word {word} written in the image?", word == scene.word)


KINDS: dict[str, Callable[[Scene], Questions]] = {
    "colour": colour_questions,
    "shape": shape_questions,
    "size": size_questions,
    "position": position_questions,
    "existence": existence_questions,
    "counting": counting_questions,
    "relation": relation_questions,
    "text": text_questions,
}
"""The kinds of questions of a benchmark."""
TRAINING_KINDS = KINDS | {"comparison": comparison_questions, "description": description_questions}


def statements(rng: np.random.Generator, scene: Scene, count: int) -> str:
    """Returns a caption of `count` sentences of random kinds that are true of the scene."""
    found: dict[str, None] = {}
    while len(found) < count:
        question = choose(rng, scene, pick(rng, list(KINDS)))
        if question and question.statement:
            found[question.statement] = None
    return " ".join(found)


def choose(
    rng: np.random.Generator, scene: Scene, kind: str, template: str | None = None, answer: str | None = None
) -> SceneQuestion | None:
    """Returns a random question of a kind: first the template is drawn, then the answer, then the question.

    Args:
        template, answer: drawn if they are None.

    Returns:
        None if the scene has no such question.
    """
    found: dict[str, dict[str, list[SceneQuestion]]] = {}
    for question in TRAINING_KINDS[kind](scene):
        if template in (None, question.template) and answer in (None, question.answer):
            found.setdefault(question.template, {}).setdefault(question.answer, []).append(question)
    if not found:
        return None
    answers = found[pick(rng, list(found))]
    questions = answers[pick(rng, list(answers))]
    # most objects that are absent share nothing with the scene; the hard ones would be rare
    details = sorted({question.detail for question in questions})
    detail = pick(rng, details)
    return pick(rng, [question for question in questions if question.detail == detail])


@cache
def templates(kind: str) -> dict[str, list[str]]:
    """Returns template -> answers of a kind."""
    rng, found = np.random.default_rng(0), {}
    for _ in range(NUM_SEARCHED):
        for question in TRAINING_KINDS[kind](random_scene(rng)):
            found.setdefault(question.template, set()).add(question.answer)
    return {template: sorted(found[template]) for template in sorted(found)}


def balanced_question(rng: np.random.Generator, kind: str, number: int) -> tuple[Scene, SceneQuestion]:
    """Returns question `number` of a kind, with its scene.

    With the number, first the template changes and then the answer. So all templates are equally frequent, and all
    answers to the questions of a template are.
    """
    known = templates(kind)
    template = list(known)[number % len(known)]
    answer = known[template][number // len(known) % len(known[template])]
    while True:
        scene = random_scene(rng)
        if question := choose(rng, scene, kind, template, answer):
            return scene, question
