"""Benchmarks of free answers that a language model judges: LLaVA-Bench, MM-Vet and MMHal-Bench."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindvlm.evaluation.benchmark import Answer
from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import Question, QuestionBenchmark, answered, id_of
from mindvlm.evaluation.scorers import judged
from mindvlm.evaluation.submissions import write_json, write_json_lines

LLAVA_BENCH = "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
LLAVA_RULES = "llava/eval/table/rule.json of github.com/haotian-liu/LLaVA"
MM_VET = "mm-vet.zip of github.com/yuweihao/MM-Vet"
MMHAL = "huggingface.co/datasets/Shengcao1006/MMHal-Bench"
NAMES = ("answers_gpt4.jsonl", "context.jsonl", "rule.json")


def read_llava_bench(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    """Pairs questions with reference answers by their order, as the original does."""
    references, contexts = files.json_lines(NAMES[0]), files.json_lines(NAMES[1])
    captions = {row["image"]: row["caption"] for row in contexts}
    rules, questions = files.json(NAMES[2]), files.json_lines("questions.jsonl")
    found = []
    for row, reference in zip(questions, references, strict=True):
        category = f"llava_bench_{row['category']}"
        truth = {"reference": reference, "context": captions[row["image"]], "rule": rules[category]}
        images = (files.root / "images" / row["image"],)
        written = {"question_id": row["question_id"]}
        found.append(Question(str(row["question_id"]), row["text"], images, truth, category, written))
    return found


def ask_for_review(question: Question, answer: Answer, replies: Sequence[str | None]) -> dict:
    truth = question.truth
    texts = (truth["reference"]["text"], answer["text"])
    return judged.review_request(question.prompt, truth["context"], texts, truth["rule"])


def review_verdict(question: Question, answer: Answer) -> tuple[float, float] | None:
    return judged.review_scores(answer["replies"][0]) if answer["replies"] else None


def compat_review(question: Question, answer: Answer) -> tuple[float, float] | None:
    """Counts a review without two numbers as -1, as the original does."""
    return (review_verdict(question, answer) or judged.NO_SCORES) if answer["replies"] else None


def tabulate_reviews(scored: Sequence[Weighted]) -> Rows:
    groups: dict[str, list[tuple[float, float]]] = {"all": []}
    for question, scores, count in scored:
        for group in ("all", question.group):
            groups.setdefault(group, []).extend([scores] * count)
    return {
        group: {"questions": len(scores), **judged.review_figures(scores)} for group, scores in sorted(groups.items())
    }


def submit_reviews(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    """Writes the reviews as the original program does, as far as the judge has given them."""
    rows = []
    for one in questions:
        answer = answers.get(one.id, {})
        if not answer.get("replies"):
            continue
        question_id = one.written["question_id"]
        scores = judged.review_scores(answer["replies"][0])
        rows.append(
            {
                "id": len(rows) + 1,
                "question_id": question_id,
                "answer1_id": one.truth["reference"].get("answer_id", question_id),
                "answer2_id": answer.get("answer_id", question_id),
                "category": one.group,
                "content": answer["replies"][0],
                "tuple": list(scores or (-1, -1)),
            }
        )
    return [write_json_lines(output / "reviews.jsonl", rows)] if rows else []


def read_mm_vet(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    return [
        Question(
            key.removeprefix("v1_"),
            row["question"],
            (files.root / "images" / row["imagename"],),
            written={"question_id": int(key.removeprefix("v1_"))},
        )
        for key, row in files.json("mm-vet.json").items()
    ]


def submit_mm_vet(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = {f"v1_{one.id}": text for one, text in answered(questions, answers)}
    return [write_json(output / "mm-vet_submission.json", rows, indent=2)]


def read_mmhal(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    template = files.assigned_text("eval_gpt4.py", "template")
    return [
        Question(
            str(number),
            row["question"],
            (files.root / "images" / Path(row["image_src"]).name,),
            {**row, "template": template, "type": number % judged.NUM_QUESTION_TYPES},
            written={"question_id": number},
        )
        for number, row in enumerate(files.json("response_template.json"))
    ]


def ask_for_rating(question: Question, answer: Answer, replies: Sequence[str | None]) -> dict:
    truth = question.truth
    content = ", ".join(truth["image_content"])
    text = truth["template"].format(content, truth["question"], truth["gt_answer"], answer["text"])
    return {"messages": [{"role": "user", "content": text}], "temperature": 0.0}


def rating_verdict(question: Question, answer: Answer) -> int | None:
    return judged.hallucination_rating(answer["replies"][0]) if answer["replies"] else None


def compat_rating(question: Question, answer: Answer) -> int | None:
    """Counts a review without exactly one rating as 0, as the original does."""
    return (rating_verdict(question, answer) or 0) if answer["replies"] else None


def tabulate_ratings(scored: Sequence[Weighted]) -> Rows:
    """Returns mean rating and share of hallucinations of all questions and of each of the eight types."""
    groups: dict[str, list[int]] = {"all": []}
    for question, rating, count in scored:
        for group in ("all", question.truth.get("question_type") or f"type {question.truth['type']}"):
            groups.setdefault(group, []).extend([rating] * count)
    return {
        group: {
            "questions": len(ratings),
            "rating": sum(ratings) / len(ratings),
            "hallucination_rate": sum(rating < judged.FAITHFUL_RATING for rating in ratings) / len(ratings),
        }
        for group, ratings in groups.items()
    }


def submit_mmhal(files: DataFolder, output: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    rows = files.json("response_template.json")
    for one, text in answered(questions, answers):
        rows[int(one.id)]["model_answer"] = text
    return [write_json(output / "mmhal_responses.json", rows, indent=1)]


ENTRIES = {
    "llava-bench-wild": QuestionBenchmark(
        summary="LLaVA-Bench (in the wild): scores of a judge relative to reference answers",
        needs={"questions.jsonl": LLAVA_BENCH, NAMES[0]: LLAVA_BENCH, NAMES[1]: LLAVA_BENCH, NAMES[2]: LLAVA_RULES},
        pictures={"images": LLAVA_BENCH},
        read=read_llava_bench,
        max_new_tokens=1024,
        judge=(ask_for_review,),
        verdict=review_verdict,
        compat=lambda: compat_review,
        compat_note="a review without two numbers counts as -1 and -1",
        tabulate=tabulate_reviews,
        headline=("all", "ratio"),
        submit=submit_reviews,
    ),
    "mm-vet": QuestionBenchmark(
        summary="MM-Vet, scored by its online evaluator",
        needs={"mm-vet.json": MM_VET},
        pictures={"images": MM_VET},
        read=read_mm_vet,
        max_new_tokens=1024,
        key=lambda row: id_of(row).removeprefix("v1_"),
        submit=submit_mm_vet,
    ),
    "mmhal": QuestionBenchmark(
        summary="MMHal-Bench: rating 0 to 6 by a judge, and the share of hallucinations",
        needs=dict.fromkeys(("response_template.json", "eval_gpt4.py"), MMHAL),
        pictures={"images": f"test_data.zip of {MMHAL}"},
        read=read_mmhal,
        max_new_tokens=1024,
        judge=(ask_for_rating,),
        verdict=rating_verdict,
        compat=lambda: compat_rating,
        compat_note="a review without exactly one rating counts as 0",
        tabulate=tabulate_ratings,
        headline=("all", "rating"),
        submit=submit_mmhal,
    ),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
