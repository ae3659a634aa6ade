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
    """Returns the questions. Their truth is the answer and the template of the question."""
    return [
        Question(
            str(row["question_id"]),
            row["text"] + SHORT_ANSWER,
            (files.root / GRAY if options.blind else files.root / IMAGES / row["image"],),
            (row["answer"], row["template"]),
            row["type"],
            {"question_id": row["question_id"]},
        )
        for row in files.json_lines(QUESTIONS)
    ]


def tabulate_scenes(scored: Sequence[Weighted]) -> Rows:
    """Returns the accuracy of each type, and that of the most frequent answer to each template."""
    rows = mean_rows("accuracy", scored, lambda question: [question.group])
    counts: dict[tuple[str, str], Counter] = {}
    for question, _, count in scored:
        answer, template = question.truth
        counts.setdefault((question.group, template), Counter())[answer] += count
    for group, figures in rows.items():
        most = sum(max(answers.values()) for (kind, _), answers in counts.items() if group in (kind, "all"))
        figures["majority_answer"] = 100 * most / figures["questions"]
    return rows


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
