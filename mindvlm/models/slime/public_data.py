"""The sources of SliME's training set SMR: how their items become questions and answers.

Keys and file names are those of the published data sets. Images have the places that the README of SMR lists, except
TextbookQA, which that list names GeoQA3 by mistake. The authors' prompts are known in part (the paper and issue 6 of
their repository): rationales as answers, and ScienceQA's context, options and `<id>.jpg`. Short answers and letters are
asked for in the words of SliME's evaluation.
"""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.processing.samples.public_data import (
    LETTERS,
    Exchange,
    Item,
    PublicData,
    Unusable,
    items_of,
    letter_of,
    options_of,
    read_json,
    read_json_lines,
    read_text,
    records_of,
    shown_options,
    text_of,
)

ASKS_FOR_WORDS = "Answer the question using a single word or phrase."
ASKS_FOR_LETTER = "Answer with the option's letter from the given choices directly."
DESCRIBE = (
    "Describe this diagram in detail.",
    "Explain what the diagram shows.",
    "What can be learned from this picture? Describe it fully.",
    "Give a thorough description of the image.",
    "Walk through the parts of this diagram and say what they mean.",
    "Write a detailed explanation of this figure.",
    "What does this illustration depict? Be specific.",
    "Describe the picture for someone who cannot see it.",
    "Summarize in detail the content of the diagram.",
    "Explain this figure as a textbook would.",
    "Which process or structure is shown here? Describe it in detail.",
    "Provide a complete account of what is in this image.",
    "Interpret the diagram and describe all of its elements.",
    "Tell me everything that this picture explains.",
    "Describe the labels and the relations that the diagram shows.",
    "Give a careful description of the drawing.",
)
"""Questions for the descriptions of TextbookQA; one is drawn for each."""

_OPTION_MARK = re.compile(r"\W*([A-Za-z])[).:]\s*")
_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_OUTER_MARKS = re.compile(
    r"^(?:<image\d+>[ \t]*)+(?:\n|$)|^(?:<image\d+>[ \t]+)+|(?:[ \t]+<image\d+>)+[ \t]*$", re.MULTILINE
)
_DRAWING = re.compile(r"\s*!\[[^\]]*\]\([^)]*\)")


def reasoned(rationale: str, answer: str) -> str:
    """Returns a rationale that closes with the answer."""
    return f"{rationale} So the answer is {answer}."


def with_options(question: str, options: list[str], *last_lines: str) -> str:
    """Returns a question with its options on the next line."""
    return "\n".join((question, f"Options: {shown_options(options)}", *last_lines))


def arxivqa(item: Item, rng: random.Random) -> Exchange:
    """The label names its option in several ways: "B", "B)", "(b)", the whole option with its letter or without."""
    content, shown = item.content, options_of(item.content, "options")
    while len(shown) > 2 and shown[-1].startswith("##"):  # the caption of a figure
        shown.pop()
    marks = [_OPTION_MARK.match(option) for option in shown]
    options = shown
    if all(mark and mark[1].upper() == letter for mark, letter in zip(marks, LETTERS, strict=False)):
        options = [option[mark.end() :].strip() for option, mark in zip(shown, marks, strict=True)]
    label = text_of(content, "label")
    if label in shown:
        found = shown.index(label)
    elif mark := _LETTER.fullmatch(label):
        found = mark[1]
    elif label in options:
        found = options.index(label)
    else:
        mark = _OPTION_MARK.match(label)
        found = mark[1] if mark else None
    answer = letter_of(found, options)
    name = text_of(content, "image")
    texts = with_options(text_of(content, "question"), options), reasoned(text_of(content, "rationale"), answer)
    return Exchange(texts, name, f"arxivqa/{name}")


def dvqa(item: Item, rng: random.Random) -> Exchange:
    name = text_of(item.content, "image")
    question, answer = text_of(item.content, "question"), text_of(item.content, "answer")
    return Exchange((f"{question}\n{ASKS_FOR_WORDS}", answer), f"images/{name}", f"DVQA/images/{name}")


def chartqa_items(folder: Path) -> Iterator[Item]:
    for kind in ("human", "augmented"):
        for number, content in enumerate(read_json(folder / "train" / f"train_{kind}.json", list)):
            yield Item(f"{kind}-{number}", content)


def chartqa(item: Item, rng: random.Random) -> Exchange:
    name = text_of(item.content, "imgname")
    question, answer = text_of(item.content, "query"), text_of(item.content, "label")
    return Exchange((f"{question}\n{ASKS_FOR_WORDS}", answer), f"train/png/{name}", f"ChartQA/train_images/{name}")


def geometry3k_items(folder: Path) -> Iterator[Item]:
    """Yields the problems of `train`, and those of `val` if the folder exists: SMR has the drawings of both."""
    for split in ("train", "val"):
        for path in _numbered(folder / split, "*/data.json"):
            name = path.parent.name
            yield Item(name, read_json(path) | {"image": f"{split}/{name}/img_diagram.png"})


def geometry3k(item: Item, rng: random.Random) -> Exchange:
    options = options_of(item.content, "choices")
    answer = letter_of(text_of(item.content, "answer"), options)
    question = with_options(text_of(item.content, "problem_text"), options, ASKS_FOR_LETTER)
    return Exchange((question, answer), text_of(item.content, "image"), f"Geometry3K/{item.id}/img_diagram.png")


def geoqa3_items(folder: Path) -> Iterator[Item]:
    for path in _numbered(folder / "json", "*.json"):
        yield Item(path.stem, read_json(path))


def geoqa3(item: Item, rng: random.Random) -> Exchange:
    """Questions and rationales are Chinese; `answer` is the rationale, `label` the number of the right option."""
    options = options_of(item.content, "choices")
    answer = letter_of(item.content.get("label"), options)
    question = f"{text_of(item.content, 'subject')}\n选项：{shown_options(options)}"
    name = f"image/{item.id}.png"
    return Exchange((question, f"{text_of(item.content, 'answer')}\n所以答案是{answer}。"), name, f"GeoQA3/{name}")


def geoqa_plus(item: Item, rng: random.Random) -> Exchange:
    """The published records are conversations already."""
    turns = item.content.get("conversations") if isinstance(item.content, dict) else None
    if not isinstance(turns, list) or not turns:
        raise Unusable("no turns under 'conversations'")
    texts = [text_of(turn, "value") for turn in turns]
    name = text_of(item.content, "image").removeprefix("geoqa+/")
    return Exchange(texts, name, f"geoqa+/{name}")


def mathvision_items(folder: Path) -> Iterator[Item]:
    """Yields the problems that are not in the split `testmini`, on which models are evaluated."""
    path = folder / "data" / "testmini.jsonl"
    held_out = _held_out((item.id for item in items_of(read_json_lines(path))), path)
    return (item for item in items_of(read_json_lines(path.with_name("test.jsonl"))) if item.id not in held_out)


def mathvision(item: Item, rng: random.Random) -> Exchange:
    """A question marks parts of its only image by `<image1>` and so on; options that it shows are bare letters."""
    content = item.content
    question, answer = _OUTER_MARKS.sub("", text_of(content, "question")).strip(), text_of(content, "answer")
    is_choice = bool(isinstance(content, dict) and content.get("options"))
    if is_choice:
        options = options_of(content, "options")
        answer = letter_of(answer, options)
        if [option.strip("()") for option in options] != list(LETTERS[: len(options)]):
            question = with_options(question, options)
    name = text_of(content, "image")
    solution = _DRAWING.sub("", text_of(content, "solution")).strip() if content.get("solution") else ""
    if solution:
        return Exchange((question, reasoned(solution, answer)), name, f"mathvision/{name}")
    question = f"{question}\n{ASKS_FOR_LETTER if is_choice else ASKS_FOR_WORDS}".strip()
    return Exchange((question, answer), name, f"mathvision/{name}")


def scienceqa_items(folder: Path) -> Iterator[Item]:
    for name, content in read_json(folder / "problems.json").items():
        if not isinstance(content, dict) or content.get("split") == "train":
            yield Item(name, content)


def scienceqa(item: Item, rng: random.Random) -> Exchange:
    """The answer ends in the words in which SliME's evaluation looks for the letter."""
    content, options = item.content, options_of(item.content, "choices")
    lines = [
        f"{name}: {content[key].strip()}"
        for name, key in (("Lecture", "lecture"), ("Solution", "solution"))
        if isinstance(content.get(key), str) and content[key].strip()
    ]
    answer = "\n".join((*lines, f"The answer is {letter_of(content.get('answer'), options)}."))
    context = text_of(content, "hint") if content.get("hint") else "N/A"
    question = with_options(f"Context: {context}\nQuestion: {text_of(content, 'question')}", options)
    if not content.get("image"):
        return Exchange((question, answer))
    return Exchange((question, answer), f"train/{item.id}/{text_of(content, 'image')}", f"scienceqa/{item.id}.jpg")


def tabmwp_items(folder: Path) -> Iterator[Item]:
    for split in ("train", "dev"):
        yield from (Item(*entry) for entry in read_json(folder / f"problems_{split}.json").items())


def tabmwp(item: Item, rng: random.Random) -> Exchange:
    content, answer = item.content, text_of(item.content, "answer")
    question = text_of(content, "question")
    if content.get("unit"):
        question += f" (Unit: {text_of(content, 'unit')})"
    if content.get("choices"):
        options = options_of(content, "choices")
        answer = letter_of(options.index(answer) if answer in options else None, options)
        question = with_options(question, options)
    texts = question, reasoned(text_of(content, "solution"), answer)
    return Exchange(texts, f"tables/{item.id}.png", f"tabmwp/{item.id}.png")


def textbookqa_items(folder: Path) -> Iterator[Item]:
    """Yields the questions about diagrams and the diagrams with a description; other questions have no image."""
    path = folder / "train" / "tqa_v1_train.json"
    for lesson in read_json(path, list):
        lesson = records_of(lesson, dict, path)
        questions = lesson.get("questions")
        diagrams = questions.get("diagramQuestions") if isinstance(questions, dict) else None
        for entries in (diagrams, lesson.get("instructionalDiagrams")):
            yield from (Item(*entry) for entry in (entries.items() if isinstance(entries, dict) else ()))


def textbookqa(item: Item, rng: random.Random) -> Exchange:
    content, name = item.content, text_of(item.content, "imagePath")
    if "answerChoices" in content:
        choices = content["answerChoices"]
        # choices are under their letters
        entries = [choices[key] for key in sorted(choices)] if isinstance(choices, dict) else []
        options = options_of({"answerChoices": [text_of(entry, "processedText") for entry in entries]}, "answerChoices")
        answer = letter_of(text_of(content, "correctAnswer", "processedText"), options)
        texts = with_options(text_of(content, "beingAsked", "processedText"), options, ASKS_FOR_LETTER), answer
    else:
        texts = rng.choice(DESCRIBE), text_of(content, "processedText")
    return Exchange(texts, f"train/{name}", f"tqa/train/{name}")


def ai2d_items(folder: Path) -> Iterator[Item]:
    """Yields the questions about images that are not in the official test split."""
    path = folder / "ai2d_test_ids.csv"
    held_out = _held_out(read_text(path).split(), path)
    for path in _numbered(folder / "questions", "*.json"):
        if path.name.partition(".")[0] in held_out:
            continue
        content = read_json(path)
        questions = records_of(content.get("questions"), dict, path)
        image = {"image": content.get("imageName")}
        entries = [
            {"question": question} | image | records_of(questions[question], dict, path) for question in questions
        ]
        yield from items_of(entries, "questionId")


def ai2d(item: Item, rng: random.Random) -> Exchange:
    """A question with `abcLabel` is about letters, which replace the words in the image of that name in `abc_images`.

    An option "{}" stands for none.
    """
    shown = options_of(item.content, "answerTexts")
    right = shown[LETTERS.index(letter_of(item.content.get("correctAnswer"), shown))]
    options = [option for option in dict.fromkeys(shown) if option != "{}"]
    answer = letter_of(options.index(right) if right in options else None, options)
    question = with_options(text_of(item.content, "question"), options, ASKS_FOR_LETTER)
    folder = "abc_images" if item.content.get("abcLabel") else "images"
    name = f"{folder}/{text_of(item.content, 'image')}"
    return Exchange((question, answer), name, f"ai2d/{name}")


def _held_out(names: Iterable[str], path: Path) -> set[str]:
    """Returns the numbers of the items to leave out. Raises UserError if there are none, or others than numbers."""
    held_out = set(names)
    if not held_out or not all(name.isdecimal() for name in held_out):
        raise UserError(f"{path}: expected the numbers of the items to leave out; download it again")
    return held_out


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Returns the matching files in the order of the numbers in their paths."""
    files = [path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: ([int(digits) for digits in re.findall(r"\d+", str(path))], str(path)))


PUBLIC_DATA = {
    "arxivqa": PublicData(
        title="ArxivQA",
        page="MMInstruction/ArxivQA on Hugging Face",
        needs={"arxivqa.jsonl": "the questions", "images": "images.tgz, unpacked"},
        read=lambda folder: items_of(read_json_lines(folder / "arxivqa.jsonl")),
        exchange=arxivqa,
    ),
    "dvqa": PublicData(
        title="DVQA",
        page="https://github.com/kushalkafle/DVQA_dataset",
        needs={"train_qa.json": "the questions, from qa.tar.gz", "images": "images.tar.gz, unpacked"},
        read=lambda folder: items_of(read_json(folder / "train_qa.json", list), "question_id"),
        exchange=dvqa,
        num_records=200_000,
    ),
    "chartqa": PublicData(
        title="ChartQA",
        page="https://github.com/vis-nlp/ChartQA (folder ChartQA Dataset)",
        needs={
            "train/train_human.json": "questions that people wrote",
            "train/train_augmented.json": "questions that a program wrote",
            "train/png": "the charts",
        },
        read=chartqa_items,
        exchange=chartqa,
    ),
    "geometry3k": PublicData(
        title="Geometry3K",
        page="https://lupantech.github.io/inter-gps",
        needs={"train": "train.zip, unpacked: a folder with data.json and img_diagram.png for each problem"},
        takes={"val": "val.zip, unpacked: the validation split, which SMR has too"},
        read=geometry3k_items,
        exchange=geometry3k,
    ),
    "geoqa3": PublicData(
        title="GeoQA3",
        page="https://github.com/chen-judge/GeoQA",
        needs={"json": "a file for each problem, from GeoQA3 in data.zip", "image": "the drawings, from there"},
        read=geoqa3_items,
        exchange=geoqa3,
    ),
    "mathvision": PublicData(
        title="MathVision",
        page="https://github.com/mathllm/MATH-V",
        needs={
            "data/test.jsonl": "the problems",
            "data/testmini.jsonl": "those to leave out",
            "images": "the drawings",
        },
        read=mathvision_items,
        exchange=mathvision,
    ),
    "scienceqa": PublicData(
        title="ScienceQA",
        page="https://github.com/lupantech/ScienceQA",
        needs={"problems.json": "the questions, from data/scienceqa", "train": "the images' train.zip, unpacked"},
        read=scienceqa_items,
        exchange=scienceqa,
    ),
    "tabmwp": PublicData(
        title="TabMWP",
        page="https://github.com/lupantech/PromptPG (folder data/tabmwp)",
        needs={"problems_train.json": "problems", "problems_dev.json": "more problems", "tables": "the images"},
        read=tabmwp_items,
        exchange=tabmwp,
    ),
    "textbookqa": PublicData(
        title="TextbookQA",
        page="https://prior.allenai.org/projects/tqa",
        needs={"train/tqa_v1_train.json": "the lessons", "train": "tqa_train_val_test.zip, unpacked"},
        read=textbookqa_items,
        exchange=textbookqa,
    ),
    "ai2d": PublicData(
        title="AI2D",
        page=(
            "https://prior.allenai.org/projects/diagram-understanding (abc_images: "
            "the link to AI2D in the README of https://github.com/yfzhang114/SliME)"
        ),
        needs={
            "questions": "a file for each image",
            "images": "the diagrams",
            "abc_images": "the diagrams with letters in place of words",
            "ai2d_test_ids.csv": "the images to leave out",
        },
        read=ai2d_items,
        exchange=ai2d,
    ),
    "geoqa-plus": PublicData(
        title="GeoQA+",
        page="OpenGVLab/InternVL on Hugging Face",
        needs={
            "geoqa+.jsonl": "the problems as conversations, from playground.zip",
            "images": "geoqa+_images.zip, unpacked",
        },
        read=lambda folder: items_of(read_json_lines(folder / "geoqa+.jsonl")),
        exchange=geoqa_plus,
    ),
}
"""Name of the source -> how it is prepared."""
