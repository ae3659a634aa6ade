"""Small benchmarks in the folder layouts of public ones: drawn scenes (POPE, MME, GQA, `scenes`) and lines of text.

Picture n and its questions depend on the seed and n alone.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.datagen import rendered_text
from mindvlm.datagen.dataset import pick, write_file
from mindvlm.datagen.scene_data import VERSION
from mindvlm.datagen.scene_questions import (
    ABSENT,
    KINDS,
    SHORT_ANSWER,
    SceneQuestion,
    balanced_question,
    choose,
    existence_questions,
)
from mindvlm.datagen.scenes import Scene, draw_scene, random_scene

SIZE = 96
MARK = "drawn.json"
"""Lies in the folders, whose figures are not comparable with published ones; holds what they were made with."""
# a task of MME -> kind and template of a yes/no question
MME_TASKS = {
    "existence": ("existence", "both"),
    "count": ("counting", "are there, shape"),
    "position": ("position", "is on the side"),
    "color": ("colour", "is"),
    "OCR": ("text", "is"),
}
GQA_KINDS = ("colour", "shape", "size", "position", "existence", "relation")

Rows = list[dict]
Add = Callable[[np.random.Generator, int, Path], None]


def write_benchmark(
    name: str, folder: Path, *, num_images: int, seed: int, progress: Callable[[int, int], None]
) -> None:
    """Writes the pictures and annotation files of a benchmark of `WRITERS`; those of an earlier run are replaced.

    Args:
        progress: called with the number of finished pictures and `num_images`.

    Raises:
        UserError: the folder holds other data or cannot be written.
    """
    add, finish = WRITERS[name]()
    made = {"benchmark": name, "seed": seed, "version": VERSION}
    try:
        if folder.exists() and any(folder.iterdir()) and read_mark(folder) != made:
            raise UserError(f"{folder} holds other data than {made}; delete it or choose another output")
        write_json(folder / MARK, made)
        for number in range(num_images):
            add(np.random.Generator(np.random.PCG64([seed, number])), number, folder)
            progress(number + 1, num_images)
        finish(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another output") from None


def read_mark(folder: Path) -> dict | None:
    """Returns what a folder was made with; None if it was not made here."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def save(image: Image.Image | Scene, path: Path) -> None:
    """Writes a picture, or that of a scene."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = draw_scene(image, SIZE) if isinstance(image, Scene) else image
    picture.save(path, quality=95)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(value, indent=1).encode() + b"\n")


def write_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def scenes_writer() -> tuple[Add, Callable[[Path], None]]:
    """One balanced question about each picture; the kinds take turns."""
    rows: Rows = []

    def add(rng: np.random.Generator, number: int, folder: Path) -> None:
        kind = list(KINDS)[number % len(KINDS)]
        scene, question = balanced_question(rng, kind, number // len(KINDS))
        name = f"{number:06d}.png"
        save(scene, folder / "images" / name)
        row = {"question_id": number, "image": name, "text": question.text, "answer": question.answer}
        rows.append({**row, "type": kind, "template": question.template})

    def finish(folder: Path) -> None:
        save(Image.new("RGB", (SIZE, SIZE), Scene.background), folder / "gray.png")
        write_lines(folder / "questions.jsonl", rows)

    return add, finish


def pope_writer() -> tuple[Add, Callable[[Path], None]]:
    """One object that is there and one that is not, of each category and picture; see `ABSENT`."""
    rows: dict[str, Rows] = {category: [] for category in ABSENT}

    def add(rng: np.random.Generator, number: int, folder: Path) -> None:
        name = f"{number:06d}.png"
        while True:
            scene = random_scene(rng)
            asked = [question for question in existence_questions(scene) if question.template == "both"]
            present = [question for question in asked if question.answer == "yes"]
            absent = {kind: [question for question in asked if question.detail == kind] for kind in ABSENT}
            if all(absent.values()) and len(present) >= len(ABSENT):
                break
        save(scene, folder / "val2014" / name)
        for (category, others), place in zip(absent.items(), rng.permutation(len(present)), strict=False):
            for question in (present[place], pick(rng, others)):
                rows[category].append({"image": name, "text": question.text, "label": question.answer})

    def finish(folder: Path) -> None:
        asked: Rows = []
        for category, labelled in rows.items():
            write_lines(folder / "coco" / f"coco_pope_{category}.json", labelled)
            for row in labelled:
                question = {"question_id": len(asked), "image": row["image"], "text": row["text"] + SHORT_ANSWER}
                asked.append({**question, "category": category})
        write_lines(folder / "llava_pope_test.jsonl", asked)

    return add, finish


def mme_writer() -> tuple[Add, Callable[[Path], None]]:
    """A question with "yes" and one with "no" about each picture; the tasks take turns."""
    root = "MME_Benchmark_release_version"

    def add(rng: np.random.Generator, number: int, folder: Path) -> None:
        task = list(MME_TASKS)[number % len(MME_TASKS)]
        pair: list[SceneQuestion | None] = [None]
        while None in pair:
            scene = random_scene(rng)
            pair = [choose(rng, scene, *MME_TASKS[task], answer) for answer in ("yes", "no")]
        path = folder / root / task / f"{number:06d}.png"
        save(scene, path)
        lines = [f"{one.text} Please answer yes or no.\t{one.answer.capitalize()}\n" for one in pair if one]
        write_file(path.with_suffix(".txt"), "".join(lines).encode())

    return add, lambda folder: None


def gqa_writer() -> tuple[Add, Callable[[Path], None]]:
    """One balanced question about each picture, of the kinds that GQA has; the kinds take turns."""
    rows: dict[str, dict] = {}

    def add(rng: np.random.Generator, number: int, folder: Path) -> None:
        kind = GQA_KINDS[number % len(GQA_KINDS)]
        scene, question = balanced_question(rng, kind, number // len(GQA_KINDS))
        name = f"n{number:06d}"
        save(scene, folder / "images" / f"{name}.jpg")
        form = "query" if question.text.startswith("What") else "choose" if " or " in question.text else "verify"
        row = {"question": question.text, "imageId": name, "answer": question.answer, "isBalanced": True}
        rows[f"{number:08d}"] = {**row, "types": {"structural": form, "semantic": kind}}

    return add, lambda folder: write_json(folder / "questions1.2" / "testdev_balanced_questions.json", rows)


def lines_writer() -> tuple[Add, Callable[[Path], None]]:
    """One or two lines of printed text, of words that the training of Vary-nano leaves out."""
    rows: Rows = []

    def add(rng: np.random.Generator, number: int, folder: Path) -> None:
        text = rendered_text.random_text(rng, split="evaluation")
        shown = rendered_text.render(text, rng)
        name = f"{number:06d}.png"
        save(shown.image, folder / "en_pdf_png" / name)
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": shown.text}]
        rows.append({"image": name, "conversations": turns})

    return add, lambda folder: write_json(folder / "en_page_ocr.json", rows)


WRITERS: dict[str, Callable[[], tuple[Add, Callable[[Path], None]]]] = {
    "scenes": scenes_writer,
    "pope": pope_writer,
    "mme": mme_writer,
    "gqa": gqa_writer,
    "page-ocr": lines_writer,
}
