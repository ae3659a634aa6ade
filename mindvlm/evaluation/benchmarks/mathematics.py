"""Benchmarks of mathematics: MathVista, MathVerse and MathVision."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindvlm.evaluation.benchmark import Answer
from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import SHORT_ANSWER, Question, QuestionBenchmark, answered, mean_rows
from mindvlm.evaluation.scorers import judged, mathematics
from mindvlm.evaluation.submissions import write_json, write_json_lines

VISTA, VERSE, VISION = (
    f"github.com/{name}" for name in ("lupantech/MathVista", "ZrrSkywalker/MathVerse", "mathllm/MATH-V")
)
VISTA_PROMPT, VERSE_PROMPTS = "evaluation/prompts/ext_ans.py", "evaluation/prompts.py"
VISTA_KEYS = ("question_type", "answer_type", "language", "category", "task", "context", "grade", "skills")


def read_mathvista(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    demonstration = files.assigned_text(VISTA_PROMPT, "demo_prompt").strip()
    queries, found = files.json("data/query.json"), []
    for key, row in files.json("data/testmini.json").items():
        types = {name: row[name] for name in ("question_type", "answer_type", "choices", "precision", "answer")}
        truth = {**types, "metadata": row["metadata"], "demonstration": demonstration}
        found.append(Question(key, queries[key], (files.root / "data" / row["image"],), truth))
    return found


def extract_mathvista(question: Question, answer: Answer, replies: Sequence[str | None]) -> dict | None:
    if quick_mathvista(question, answer) is not None:
        return None
    prompt = f"{question.truth['demonstration']}\n\n{question.prompt}\n\n{answer['text']}\n\nExtracted answer: "
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 1024}


def quick_mathvista(question: Question, answer: Answer) -> str | None:
    kinds = {key: question.truth[key] for key in ("question_type", "answer_type", "choices")}
    return mathematics.quick_extraction(answer["text"], **kinds)


def mathvista_verdict(question: Question, answer: Answer) -> bool | None:
    extraction = quick_mathvista(question, answer)
    if extraction is None:
        if not answer["replies"]:
            return None
        extraction = answer["replies"][0]
    kinds = {key: question.truth[key] for key in ("question_type", "answer_type", "choices", "precision")}
    return mathematics.mathvista_answer(extraction, **kinds) == question.truth["answer"]


def mathvista_groups(question: Question) -> list[str]:
    values = {**question.truth["metadata"], **question.truth}
    found = [values[key] for key in VISTA_KEYS]
    return [group for value in found for group in (value if isinstance(value, list) else [value])]


def read_mathverse(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    prompts = [files.assigned_text(VERSE_PROMPTS, f"demo_prompt_{stage}").strip() for stage in ("extract", "score")]
    return [
        Question(
            str(row["sample_index"]),
            row["query_cot"],
            (files.root / "images" / row["image"],) if row["image"] else (),
            {**row, "prompts": prompts},
            written={"sample_index": row["sample_index"]},
        )
        for row in files.json("testmini.json")
    ]


def mathverse_request(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 256}


def extract_mathverse(question: Question, answer: Answer, replies: Sequence[str | None]) -> dict:
    prompt = question.truth["prompts"][0]
    return mathverse_request(f"{prompt}\n\nModel response: '{answer['text']}'\nExtracted Answer: ")


def compare_mathverse(question: Question, answer: Answer, replies: Sequence[str | None]) -> dict:
    truth = question.truth
    filled = truth["prompts"][1].format(
        question=truth["question"], gt=truth["answer"], extraction=judged.extracted(replies[0])
    )
    return mathverse_request(filled)


def mathverse_verdict(question: Question, answer: Answer) -> bool | None:
    return judged.judgement(answer["replies"][1]) if len(answer["replies"]) == 2 else None


def mathverse_groups(question: Question) -> list[str]:
    metadata = question.truth["metadata"]
    subject = metadata["subject"]
    return [question.truth["problem_version"], subject, f"{subject}: {metadata['subfield']}"]


def read_mathvision(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    found = []
    for row in files.json_lines(f"data/{options.split}.jsonl"):
        given = row["options"]
        lines = ""
        if given and "".join(given) != "ABCDE":
            lines = "".join(f"({letter}) {option}\n" for letter, option in zip("ABCDE", given, strict=True))
        prompt = f"{row['question']}\n{lines}{SHORT_ANSWER}"
        found.append(Question(str(row["id"]), prompt, (files.root / row["image"],), row))
    return found


def mathvision_verdict(question: Question, answer: Answer) -> bool:
    truth, given = str(question.truth["answer"]), question.truth["options"]
    value = given[ord(truth) - ord("A")] if given else ""
    found = mathematics.mathvision_answer(answer["text"])
    return mathematics.is_equal_answer(truth, found) or mathematics.is_equal_answer(value, found)


def tabulate_mathvision(scored: Sequence[Weighted]) -> Rows:
    return mean_rows(
        "accuracy", scored, lambda question: (question.truth["subject"], f"level {question.truth['level']}")
    )


def submit_mathvista(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the responses as the official programs for extraction and scores read them."""
    annotations = files.json("data/testmini.json")
    rows = {
        one.id: {**annotations[one.id], "query": one.prompt, "response": text}
        for one, text in answered(questions, answers)
    }
    return [write_json(output / "mathvista_responses.json", rows, indent=1)]


def submit_mathverse(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the answers as the official programs for extraction and scores read them."""
    annotations = {str(row["sample_index"]): row for row in files.json("testmini.json")}
    rows = [{**annotations[one.id], "model_answer": text} for one, text in answered(questions, answers)]
    return [write_json(output / "mathverse_answers.json", rows, indent=1)]


def submit_mathvision(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = [{"id": one.id, "response": text} for one, text in answered(questions, answers)]
    return [write_json_lines(output / "mathvision_responses.jsonl", rows)]


ENTRIES = {
    "mathvista": QuestionBenchmark(
        summary="MathVista testmini: accuracy; a judge extracts answers from sentences",
        needs=dict.fromkeys(("data/testmini.json", "data/query.json", VISTA_PROMPT), VISTA),
        pictures={"data/images": "images.zip of huggingface.co/datasets/AI4Math/MathVista"},
        read=read_mathvista,
        max_new_tokens=1024,
        judge=(extract_mathvista,),
        verdict=mathvista_verdict,
        tabulate=lambda scored: mean_rows("accuracy", scored, mathvista_groups),
        kind=lambda question: tuple(mathvista_groups(question)),
        headline=("all", "accuracy"),
        submit=submit_mathvista,
    ),
    "mathverse": QuestionBenchmark(
        summary="MathVerse testmini: accuracy by a judge, which extracts and compares answers",
        needs={"testmini.json": "huggingface.co/datasets/AI4Math/MathVerse", VERSE_PROMPTS: VERSE},
        pictures={"images": "images.zip of huggingface.co/datasets/AI4Math/MathVerse"},
        read=read_mathverse,
        max_new_tokens=1024,
        judge=(extract_mathverse, compare_mathverse),
        verdict=mathverse_verdict,
        tabulate=lambda scored: mean_rows("accuracy", scored, mathverse_groups),
        kind=lambda question: tuple(mathverse_groups(question)),
        headline=("all", "accuracy"),
        submit=submit_mathverse,
    ),
    "mathvision": QuestionBenchmark(
        summary="MathVision: accuracy of each subject and level by rules",
        needs={"data/{split}.jsonl": VISION},
        pictures={"images": f"images.zip, see {VISION}"},
        read=read_mathvision,
        max_new_tokens=1024,
        splits=("test", "testmini"),
        verdict=mathvision_verdict,
        tabulate=tabulate_mathvision,
        kind=lambda question: (question.truth["subject"], question.truth["level"]),
        headline=("all", "accuracy"),
        submit=submit_mathvision,
    ),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
