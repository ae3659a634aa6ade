"""Benchmarks of short free answers: VQAv2, GQA, TextVQA, VizWiz, ChartQA and DocVQA."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.evaluation.benchmark import Answer
from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import SHORT_ANSWER, Question, QuestionBenchmark, answered, id_of, mean_of
from mindvlm.evaluation.scorers import short_answers as scorers
from mindvlm.evaluation.scorers.documents import anls
from mindvlm.evaluation.submissions import write_json

LLAVA = "eval.zip, see docs/Evaluation.md of github.com/haotian-liu/LLaVA"
VQAV2, VQAV2_ALL = (f"llava_vqav2_mscoco_{split}2015.jsonl" for split in ("test-dev", "test"))
GQA, VIZWIZ, TEXTVQA = "questions1.2/testdev_balanced_questions.json", "llava_test.jsonl", "TextVQA_0.5.1_val.json"
TEXTVQA_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
CHARTQA_PARTS = {part: f"test/test_{part}.json" for part in ("human", "augmented")}


def llava_questions(files: DataFolder, name: str, pictures: str) -> list[Question]:
    """Returns the questions of a file of LLaVA: question_id, image, text and category."""
    return [
        Question(
            str(row["question_id"]),
            row["text"],
            (files.root / pictures / row["image"],) if "image" in row else (),
            group=row.get("category", ""),
            written={"question_id": row["question_id"]},
        )
        for row in files.json_lines(name)
    ]


def submit_vqav2(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the answers to all test questions; those of other splits are empty, as in the original."""
    rows = []
    for row in files.json_lines(VQAV2_ALL):
        answer = answers.get(str(row["question_id"]), {"text": ""})
        rows.append({"question_id": row["question_id"], "answer": scorers.normalised(answer["text"])})
    return [write_json(output / "vqav2_submission.json", rows)]


def read_gqa(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    return [
        Question(
            key,
            row["question"] + SHORT_ANSWER,
            (files.root / "images" / f"{row['imageId']}.jpg",),
            row["answer"],
            "open" if row["types"]["structural"] == "query" else "binary",
        )
        for key, row in files.json(GQA).items()
        if row["isBalanced"]
    ]


def submit_gqa(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = [
        {"questionId": one.id, "prediction": scorers.gqa_answer(text)} for one, text in answered(questions, answers)
    ]
    return [write_json(output / "testdev_balanced_predictions.json", rows)]


def textvqa_key(row: Mapping) -> str:
    """Returns image and question, because the question ids of LLaVA's file are those of the images."""
    return f"{id_of(row)} {scorers.question_of_prompt(row['prompt'])}"


def read_textvqa(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    truths = {f"{row['image_id']} {row['question'].lower()}": row["answers"] for row in files.json(TEXTVQA)["data"]}
    # a question that is asked twice about a picture counts once
    found: dict[str, Question] = {}
    for row in files.json_lines(TEXTVQA_QUESTIONS):
        key = textvqa_key({"question_id": row["question_id"], "prompt": row["text"]})
        written = {"question_id": row["question_id"]}
        images = (files.root / "train_images" / row["image"],)
        found.setdefault(key, Question(key, row["text"], images, truths[key], written=written))
    return list(found.values())


def submit_vizwiz(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes all answers; the server takes no file with fewer."""
    if missing := next((one.id for one in questions if one.id not in answers), None):
        raise UserError(f"question {missing!r} has no answer; VizWiz takes only complete submissions, answer it first")
    rows = [{"image": one.truth, "answer": scorers.normalised(answers[one.id]["text"])} for one in questions]
    return [write_json(output / "vizwiz_submission.json", rows)]


def read_vizwiz(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    rows = files.json_lines(VIZWIZ)
    return [
        Question(
            str(row["question_id"]),
            row["text"],
            (files.root / "test" / row["image"],),
            row["image"],
            written={"question_id": row["question_id"]},
        )
        for row in rows
    ]


def read_chartqa(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    return [
        Question(f"{part}-{number}", row["query"], (files.root / "test/png" / row["imgname"],), row["label"], part)
        for part, name in CHARTQA_PARTS.items()
        for number, row in enumerate(files.json(name))
    ]


def chartqa_verdict(question: Question, answer: Answer) -> bool:
    return any(scorers.relaxed_match(answer["text"].strip(), truth) for truth in as_list(question.truth))


def chartqa_compat(question: Question, answer: Answer) -> bool:
    """Measures the 5 % from the answer instead of from the truth, as SliME's program does."""
    return any(scorers.relaxed_match(truth, answer["text"].strip()) for truth in as_list(question.truth))


def as_list(value: object) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def tabulate_chartqa(scored: Sequence[Weighted]) -> Rows:
    """Returns the accuracy of each part and their mean, which papers report."""
    rows = mean_of("relaxed_accuracy", groups=True)(scored)
    parts = [rows[part]["relaxed_accuracy"] for part in CHARTQA_PARTS if part in rows]
    return rows | {
        "mean of parts": {"questions": rows["all"]["questions"], "relaxed_accuracy": sum(parts) / len(parts)}
    }


def read_docvqa(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    return [
        Question(
            str(row["questionId"]),
            row["question"],
            (files.root / "spdocvqa_images" / Path(row["image"]).name,),
            None if options.split == "test" else row["answers"],
            written={"question_id": row["questionId"]},
        )
        for row in files.json(f"{options.split}_v1.0*.json")["data"]
    ]


def submit_docvqa(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = [{"questionId": one.written["question_id"], "answer": text} for one, text in answered(questions, answers)]
    return [write_json(output / "docvqa_submission.json", rows)]


ENTRIES = {
    "vqav2": QuestionBenchmark(
        summary="VQAv2 test-dev, scored by its server on EvalAI",
        needs={VQAV2: LLAVA, VQAV2_ALL: LLAVA},
        pictures={"test2015": "http://images.cocodataset.org/zips/test2015.zip"},
        read=lambda files, options: llava_questions(files, VQAV2, "test2015"),
        submit=submit_vqav2,
    ),
    "gqa": QuestionBenchmark(
        summary="GQA testdev balanced: exact accuracy",
        needs={GQA: "questions1.2.zip of cs.stanford.edu/people/dorarad/gqa/download.html"},
        pictures={"images": "images.zip of cs.stanford.edu/people/dorarad/gqa/download.html"},
        read=read_gqa,
        verdict=lambda question, answer: scorers.gqa_answer(answer["text"]) == question.truth,
        tabulate=mean_of("accuracy", groups=True),
        kind=lambda question: question.group,
        headline=("all", "accuracy"),
        submit=submit_gqa,
    ),
    "textvqa": QuestionBenchmark(
        summary="TextVQA validation with OCR tokens: soft accuracy over ten annotators",
        needs={TEXTVQA: "textvqa.org/dataset", TEXTVQA_QUESTIONS: LLAVA},
        pictures={"train_images": "train_val_images.zip of textvqa.org/dataset"},
        read=read_textvqa,
        key=textvqa_key,
        answered_twice=True,
        verdict=lambda question, answer: scorers.textvqa_score(answer["text"], question.truth),
        tabulate=mean_of("accuracy"),
        kind=lambda question: None,
        headline=("all", "accuracy"),
    ),
    "vizwiz": QuestionBenchmark(
        summary="VizWiz test, scored by its server on EvalAI",
        needs={VIZWIZ: LLAVA},
        pictures={"test": "test.zip of vizwiz.org/tasks-and-datasets/vqa"},
        read=read_vizwiz,
        submit=submit_vizwiz,
    ),
    "chartqa": QuestionBenchmark(
        summary="ChartQA test: relaxed accuracy (5 %) of questions by people and by machines",
        needs=dict.fromkeys(CHARTQA_PARTS.values(), "ChartQA Dataset.zip of github.com/vis-nlp/ChartQA"),
        pictures={"test/png": "ChartQA Dataset.zip of github.com/vis-nlp/ChartQA"},
        read=read_chartqa,
        suffix=SHORT_ANSWER,
        max_new_tokens=100,
        verdict=chartqa_verdict,
        compat=lambda: chartqa_compat,
        compat_note="the 5 % are measured from the answer instead of from the truth",
        tabulate=tabulate_chartqa,
        kind=lambda question: question.group,
        headline=("mean of parts", "relaxed_accuracy"),
    ),
    "docvqa": QuestionBenchmark(
        summary="DocVQA: average normalised Levenshtein similarity; the test split is scored by its server",
        needs={"{split}_v1.0*.json": "spdocvqa_qas.zip of rrc.cvc.uab.es, task 1 of challenge 17"},
        pictures={"spdocvqa_images": "spdocvqa_images.tar.gz of rrc.cvc.uab.es, task 1 of challenge 17"},
        read=read_docvqa,
        suffix="\nAnswer using a single word or phrase.",
        splits=("val", "test"),
        verdict=lambda question, answer: anls(answer["text"], question.truth),
        served=("test",),
        tabulate=mean_of("anls"),
        kind=lambda question: None,
        headline=("all", "anls"),
        submit=submit_docvqa,
    ),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
