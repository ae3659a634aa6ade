"""Answers of the official evaluation loops: VQA, ScienceQA and MMBench files beside a checkpoint folder."""

import base64
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mindvlm.processing.images.loading import ImageSource
from tests.golden_readers.report import Report

# the loop of MMBench adds it to the question and leaves it out of the recorded prompt
OPTION_SUFFIXES = {
    "en": "\nAnswer with the option's letter from the given choices directly.",
    "cn": "\n请直接回答选项字母。",
}


@dataclass(frozen=True)
class LoopQuestion:
    """One line of an answers file."""

    query: str
    image: ImageSource | None
    text: str


def answer_files(folder: Path) -> dict[str, list[LoopQuestion]]:
    """Returns the questions of every answers file in a case's `loops` folder, by file name.

    Images are file names or bytes. A file of an unknown kind gives an empty list.
    """
    makers = {"vqa": vqa_questions, "science": science_questions, "mmbench": mmbench_questions}
    files = {}
    for path in sorted(folder.glob("answers_*.jsonl")):
        kind = re.match(r"answers_([a-z]+)", path.name).group(1)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        files[path.name] = list(makers[kind](folder, path, lines)) if kind in makers else []
    return files


def vqa_questions(folder: Path, path: Path, lines: list[dict]) -> Iterable[LoopQuestion]:
    text = (folder / "vqa_questions.jsonl").read_text(encoding="utf-8")
    images = {entry["question_id"]: entry["image"] for entry in map(json.loads, text.splitlines())}
    return (LoopQuestion(line["prompt"], images[line["question_id"]], line["text"]) for line in lines)


def science_questions(folder: Path, path: Path, lines: list[dict]) -> Iterable[LoopQuestion]:
    entries = json.loads((folder / "sqa_questions.json").read_text(encoding="utf-8"))
    images = {entry["id"]: entry.get("image") for entry in entries}
    return (LoopQuestion(line["prompt"], images[line["question_id"]], line["text"]) for line in lines)


def mmbench_questions(folder: Path, path: Path, lines: list[dict]) -> Iterable[LoopQuestion]:
    csv.field_size_limit(sys.maxsize)
    with open(folder / "mmbench_tsv.txt", encoding="utf-8", newline="") as file:
        images = {int(row["index"]): base64.b64decode(row["image"]) for row in csv.DictReader(file, delimiter="\t")}
    suffix = OPTION_SUFFIXES["cn" if path.stem.endswith("_cn") else "en"]
    return (LoopQuestion(line["prompt"] + suffix, images[line["question_id"]], line["text"]) for line in lines)


def compare_loops(folder: Path, report: Report, ask: Callable[[LoopQuestion], str]) -> None:
    """Asks every question of the loops once and compares the texts of the answers."""
    answers: dict[LoopQuestion, str] = {}
    for name, questions in answer_files(folder).items():
        if not questions:
            report.skip(f"loops/{name}", "a loop that is not known")
            continue
        pairs = []
        for question in questions:
            key = LoopQuestion(question.query, question.image, "")
            if key not in answers:
                answers[key] = ask(question)
            pairs.append((question.query, answers[key], question.text))
        report.same(f"loops/{name}", pairs)
