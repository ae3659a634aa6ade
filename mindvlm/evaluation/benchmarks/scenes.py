"""A built-in benchmark: questions about drawn scenes, see `mindvlm-make-data benchmark`."""

import argparse
from collections import Counter
from collections.abc import Sequence

from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import SHORT_ANSWER, Question, QuestionBenchmark, mean_rows
from mindvlm.evaluation.scorers.short_answers import gqa_answer

QUESTIONS, IMAGES, GRAY = "questions.jsonl", "images", "gray.png"
ORIGIN = "mindvlm-make-data benchmark --name scenes"


def add_blind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blind", action="store_true", help="show a gray picture instead, which measures guessing")


def read_scenes(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    """Returns the questions. Their truth is the answer, and the share of the most frequent answer to their template."""
    rows = files.json_lines(QUESTIONS)
    answers: dict[tuple[str, str], Counter] = {}
    for row in rows:
        answers.setdefault((row["type"], row["template"]), Counter())[row["answer"]] += 1
    most = {key: max(counts.values()) / counts.total() for key, counts in answers.items()}
    return [
        Question(
            str(row["question_id"]),
            row["text"] + SHORT_ANSWER,
            (files.root / GRAY if options.blind else files.root / IMAGES / row["image"],),
            (row["answer"], most[row["type"], row["template"]]),
            row["type"],
            {"question_id": row["question_id"]},
        )
        for row in rows
    ]


def tabulate_scenes(scored: Sequence[Weighted]) -> Rows:
    """Returns the accuracy of each type, and that of the most frequent answer to each template."""
    guessed = [(question, question.truth[1], count) for question, _, count in scored]
    rows = mean_rows("accuracy", scored, lambda question: [question.group])
    majority = mean_rows("majority_answer", guessed, lambda question: [question.group])
    return {group: figures | majority[group] for group, figures in rows.items()}


ENTRIES = {
    "scenes": QuestionBenchmark(
        summary="built-in: questions about drawn scenes of shapes; accuracy of each type, and of the majority answer",
        needs={QUESTIONS: ORIGIN},
        pictures={IMAGES: ORIGIN, GRAY: ORIGIN},
        read=read_scenes,
        max_new_tokens=16,
        verdict=lambda question, answer: gqa_answer(answer["text"]) == question.truth[0],
        tabulate=tabulate_scenes,
        kind=lambda question: (question.group, question.truth),
        headline=("all", "accuracy"),
        add_options=add_blind,
        settings=("blind",),
    ),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
