"""Benchmarks of multiple choice: ScienceQA, MMBench, SEED-Bench and MMMU."""

import argparse
import ast
import base64
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.evaluation.benchmark import Answer
from mindvlm.evaluation.benchmarks.short_answers import LLAVA
from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import (
    OPTION_LETTER,
    SHORT_ANSWER,
    Question,
    QuestionBenchmark,
    answered,
    id_of,
    mean_rows,
)
from mindvlm.evaluation.scorers import choices
from mindvlm.evaluation.submissions import write_json, write_json_lines, write_sheet
from mindvlm.processing.images.image_span import IMAGE_MARKER

SCIENCE_REPOSITORY = "data/scienceqa of github.com/lupantech/ScienceQA"
MMBENCH_SITE = "download.openmmlab.com/mmclassification/datasets/mmbench"
SEED, SEED_QUESTIONS = "SEED-Bench.json", "llava-seed-bench.jsonl"
SEED_PAGE = "huggingface.co/datasets/AILab-CVC/SEED-Bench"
MMMU_PAGE = "huggingface.co/datasets/MMMU/MMMU"
MMMU_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SUBJECT_DOMAINS = {subject: domain for domain, subjects in MMMU_DOMAINS.items() for subject in subjects.split()}
# not in the published submission
MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
MMBENCH_PLACE = 6


def read_scienceqa(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    problems, found = files.json("problems.json"), []
    for key in files.json("pid_splits.json")[options.split]:
        problem = problems[key]
        has_picture = problem["image"] is not None
        images = (files.root / "images" / options.split / key / problem["image"],) if has_picture else ()
        prompt = f"{IMAGE_MARKER}\n" * has_picture + choices.science_prompt(problem) + OPTION_LETTER
        found.append(Question(key, prompt, images, problem))
    return found


def science_verdict(question: Question, answer: Answer) -> tuple[bool, bool]:
    """Returns whether an answer is right, and whether it is to a question with a picture."""
    index = choices.science_index(answer["text"], len(question.truth["choices"]))
    return index == question.truth["answer"], IMAGE_MARKER in answer.get("prompt", question.prompt)


def tabulate_scienceqa(scored: Sequence[Weighted]) -> Rows:
    """Returns the accuracy of all questions and of those with a picture, which papers report as SQA-I."""
    flat = [(has_picture, is_right, count) for _, (is_right, has_picture), count in scored]
    return mean_rows("accuracy", flat, lambda has_picture: ["with picture"] * has_picture)


def submit_scienceqa(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the two files of the original program."""
    details: dict[str, list[dict]] = {"correct": [], "incorrect": []}
    results, outputs = {}, {}
    for one in questions:
        answer = answers[one.id]
        letter = choices.science_letter(answer["text"])
        is_right, has_picture = science_verdict(one, answer)
        results[one.id] = choices.science_index(answer["text"], len(one.truth["choices"]))
        outputs[one.id] = answer["text"]
        details["correct" if is_right else "incorrect"].append(
            {
                "question_id": one.id,
                "parsed_ans": letter,
                "ground_truth": choices.LETTERS[one.truth["answer"]],
                "question": answer.get("prompt", one.prompt),
                "pred": answer["text"],
                "is_multimodal": has_picture,
            }
        )
    correct, count = len(details["correct"]), len(questions)
    accuracy = correct / count * 100
    result = {"acc": accuracy, "correct": correct, "count": count, "results": results, "outputs": outputs}
    return [
        write_json(output / "scienceqa_output.jsonl", details, indent=2),
        write_json(output / "scienceqa_result.json", result, indent=2),
    ]


def read_mmbench(name: str) -> Callable[[DataFolder, argparse.Namespace], list[Question]]:
    """Returns the `read` of a file of MMBench."""

    def read(files: DataFolder, options: argparse.Namespace) -> list[Question]:
        found, pictures = [], {}
        for row in files.table(name):
            # a row may name another row whose picture it shares
            pictures[row["index"]] = picture = pictures.get(row["image"], row["image"])
            given = choices.present_options(row)
            letters = list("ABCD"[: len(given)])
            hint = "" if choices.is_none(row["hint"]) else f"{row['hint']}\n"
            for round_id in range(len(given) if options.all_rounds else 1):
                lines = [f"{letter}. {option}" for letter, option in zip("ABCD", given, strict=False)]
                written = {
                    "question_id": int(row["index"]),
                    "round_id": round_id,
                    "options": list(given),
                    "option_char": list(letters),
                }
                prompt = hint + "\n".join([row["question"], *lines])
                images = (f"data:image/jpeg;base64,{picture}",)
                key = mmbench_key(written)
                found.append(Question(key, prompt, images, row, written=written))
                given, letters = given[1:] + given[:1], letters[1:] + letters[:1]
        return found

    return read


def mmbench_key(row: Mapping) -> str:
    return f"{id_of(row)}#{row['round_id']}" if row.get("round_id") else id_of(row)


def add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all_rounds", action="store_true", help="ask again with each rotation of the options")


def submit_mmbench(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the sheet for the server. Of several rounds the last one counts, as in the original."""
    rows: dict[str, list] = {}
    columns: list[str] = []
    for one in questions:
        columns = columns or [key for key in one.truth if key not in MMBENCH_DROPPED]
        cells = [None if choices.is_none(one.truth[key]) else one.truth[key] for key in columns]
        cells[columns.index("index")] = one.written["question_id"]
        previous = rows.get(one.truth["index"], [None] * (MMBENCH_PLACE + 1))[MMBENCH_PLACE]
        text = answers[one.id]["text"] if one.id in answers else previous
        rows[one.truth["index"]] = [*cells[:MMBENCH_PLACE], text, *cells[MMBENCH_PLACE:]]
    header = [*columns[:MMBENCH_PLACE], "prediction", *columns[MMBENCH_PLACE:]]
    return [write_sheet(output / "mmbench_submission.xlsx", [header, *rows.values()])]


def read_seed(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    annotation = files.json(SEED)
    truths = {choices.numeric_id(row["question_id"]): row for row in annotation["questions"]}
    types = {number: name for name, number in annotation["question_type"].items()}
    keys = ("question_id", "data_type", "answer")
    truths = {
        name: {**{key: row[key] for key in keys}, "type": types[row["question_type_id"]]}
        for name, row in truths.items()
    }
    found = []
    for row in files.json_lines(SEED_QUESTIONS):
        key = choices.numeric_id(row["question_id"])
        written = {"question_id": row["question_id"]}
        found.append(Question(key, row["text"], (files.root / row["image"],), truths[key], written=written))
    return found


def submit_seed(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = [{"question_id": one.truth["question_id"], "prediction": text} for one, text in answered(questions, answers)]
    return [write_json_lines(output / "seed_submission.jsonl", rows)]


def read_mmmu(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("MMMU's files need the package pyarrow; run: pip install pyarrow") from None
    columns = ["id", "question", "options", "answer", "question_type"] + ([] if options.score else ["image_1"])
    found = []
    for subject in SUBJECT_DOMAINS:
        for path in sorted((files.root / subject).glob(f"{options.split}-*.parquet")):
            files.path(str(path.relative_to(files.root)))
            for row in parquet.read_table(path, columns=columns).to_pylist():
                given = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", ast.literal_eval(row["options"]), strict=False))
                lines = "".join(f"({letter}) {option}\n" for letter, option in given.items())
                is_choice = row["question_type"] == "multiple-choice"
                prompt = f"{row['question']}\n\n" + (f"{lines}\n{OPTION_LETTER}" if is_choice else SHORT_ANSWER[1:])
                picture = base64.b64encode((row.get("image_1") or {}).get("bytes") or b"").decode()
                images = (f"data:image/png;base64,{picture}",) if picture else ()
                truth = {**row, "options": given, "is_choice": is_choice, "image_1": None}
                found.append(Question(row["id"], prompt, images, truth, subject))
    return found


def mmmu_choice(question: Question, answer: Answer, rng: random.Random | None) -> str:
    """Returns the answer that the submission states: the letter of a choice, or the text."""
    if not question.truth["is_choice"]:
        return answer["text"]
    letter = choices.option_letter(answer["text"], question.truth["options"])
    return letter or (rng.choice(list(question.truth["options"])) if rng else "")


def mmmu_verdict(question: Question, answer: Answer, rng: random.Random | None = None) -> bool:
    truth = question.truth["answer"]
    if question.truth["is_choice"]:
        return mmmu_choice(question, answer, rng) == truth
    return choices.is_open_match(answer["text"], ast.literal_eval(truth) if truth.startswith("[") else truth)


def mmmu_compat() -> Callable[[Question, Answer], bool]:
    """Guesses an option where an answer names none, with the original's generator and seed."""
    rng = random.Random(42)
    return lambda question, answer: mmmu_verdict(question, answer, rng)


def submit_mmmu(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = {one.id: mmmu_choice(one, answers[one.id], None) for one in questions if one.id in answers}
    return [write_json(output / "mmmu_submission.json", rows, indent=1)]


def mmbench(language: str, name: str, suffix: str) -> QuestionBenchmark:
    return QuestionBenchmark(
        summary=f"MMBench dev in {language}, scored by its server",
        needs={name: MMBENCH_SITE},
        read=read_mmbench(name),
        suffix=suffix,
        max_new_tokens=1024,
        key=mmbench_key,
        submit=submit_mmbench,
        add_options=add_rounds,
        settings=("all_rounds",),
    )


ENTRIES = {
    "scienceqa": QuestionBenchmark(
        summary="ScienceQA: accuracy of all questions and of those with a picture (SQA-I)",
        needs=dict.fromkeys(("problems.json", "pid_splits.json"), SCIENCE_REPOSITORY),
        pictures={"images": "tools/download.sh of github.com/lupantech/ScienceQA"},
        read=read_scienceqa,
        max_new_tokens=1024,
        splits=("test", "val", "minival"),
        answered_twice=True,
        missing=choices.FAILED,
        verdict=science_verdict,
        tabulate=tabulate_scienceqa,
        kind=lambda question: None,
        headline=("with picture", "accuracy"),
        submit=submit_scienceqa,
    ),
    "mmbench": mmbench("English", "mmbench_dev_20230712.tsv", OPTION_LETTER),
    "mmbench-cn": mmbench("Chinese", "mmbench_dev_cn_20231003.tsv", "\n请直接回答选项字母。"),
    "seed": QuestionBenchmark(
        summary="SEED-Bench: accuracy of each type of question, of pictures and of videos",
        needs={SEED: SEED_PAGE, SEED_QUESTIONS: LLAVA},
        pictures={
            "SEED-Bench-image": SEED_PAGE,
            "SEED-Bench-video-image": "frames of its videos, see docs/Evaluation.md of github.com/haotian-liu/LLaVA",
        },
        read=read_seed,
        key=lambda row: choices.numeric_id(id_of(row)),
        missing="",
        verdict=lambda question, answer: answer["text"] == question.truth["answer"],
        tabulate=lambda scored: mean_rows(
            "accuracy", scored, lambda question: (question.truth["type"], question.truth["data_type"])
        ),
        kind=lambda question: (question.truth["type"], question.truth["data_type"]),
        headline=("all", "accuracy"),
        submit=submit_seed,
    ),
    "mmmu": QuestionBenchmark(
        summary="MMMU: accuracy of each subject and domain; the test split is scored by its server",
        needs={"*/{split}-*.parquet": MMMU_PAGE},
        read=read_mmmu,
        splits=("validation", "test"),
        verdict=mmmu_verdict,
        compat=mmmu_compat,
        compat_note="an answer that names no option is a guess (MMMU's program)",
        served=("test",),
        tabulate=lambda scored: mean_rows(
            "accuracy", scored, lambda question: (SUBJECT_DOMAINS[question.group], question.group)
        ),
        kind=lambda question: question.group,
        headline=("all", "accuracy"),
        submit=submit_mmmu,
    ),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
