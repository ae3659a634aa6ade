"""Vary's benchmarks: page OCR, and the boxes of RefCOCO, RefCOCO+ and RefCOCOg."""

import argparse
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from mindvlm.evaluation.benchmark import Answer
from mindvlm.evaluation.bootstrap import Rows, Weighted
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.questions import Question, QuestionBenchmark, mean_of
from mindvlm.evaluation.scorers import documents

FOX = "focus_benchmark_test.zip of github.com/ucaslcl/Fox"
REFER = "github.com/lichengunc/refer"
COCO = "images/mscoco/images/train2014"
MIN_IOU = 0.5


def read_pages(files: DataFolder, options: argparse.Namespace) -> list[Question]:
    language = options.split
    return [
        Question(
            str(row["image"]),
            "Provide the OCR results of this image." if language == "en" else "写出这幅图中所有文字。",
            (files.root / f"{language}_pdf_png" / row["image"],),
            row["conversations"][1]["value"],
        )
        for row in files.json(f"{language}_page_ocr.json")
    ]


def page_verdict(question: Question, answer: Answer) -> dict[str, float]:
    return documents.page_figures(answer["text"], question.truth, documents.find_meteor())


def compat_page(question: Question, answer: Answer) -> dict[str, float]:
    """Takes the answer as the truth and the reverse, as the published program does."""
    return documents.page_figures(question.truth, answer["text"], documents.find_meteor())


def tabulate_pages(scored: Sequence[Weighted]) -> Rows:
    total = sum(count for *_, count in scored)
    means = {key: sum(count * verdict[key] for _, verdict, count in scored) / total for key in scored[0][1]}
    return {"all": {"questions": total, **means}}


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of lists, mappings, texts and numbers only, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_boxes(dataset: str, by: str) -> Callable[[DataFolder, argparse.Namespace], list[Question]]:
    """Returns the `read` of a data set, divided by `by`."""

    def read(files: DataFolder, options: argparse.Namespace) -> list[Question]:
        instances = files.json(f"{dataset}/instances.json")
        boxes = {row["id"]: row["bbox"] for row in instances["annotations"]}
        images = {row["id"]: row for row in instances["images"]}
        with open(files.path(f"{dataset}/refs({by}).p"), "rb") as file:
            try:
                references = PlainUnpickler(file, encoding="latin1").load()
            except (pickle.UnpicklingError, EOFError) as error:
                raise ValueError(str(error)) from None
        found = []
        for reference in references:
            if reference["split"] != options.split:
                continue
            image, (left, top, width, height) = images[reference["image_id"]], boxes[reference["ann_id"]]
            across, down = image["width"], image["height"]
            truth = (left / across, top / down, (left + width) / across, (top + height) / down)
            path = files.root / COCO / image["file_name"]
            for sentence in reference["sentences"]:
                prompt = f"Detect an object: {sentence['sent']}."
                found.append(Question(str(sentence["sent_id"]), prompt, (path,), truth))
        return found

    return read


def box_verdict(question: Question, answer: Answer) -> bool:
    box = documents.first_box(answer["text"])
    return box is not None and documents.intersection_over_union(box, question.truth) >= MIN_IOU


def refcoco(dataset: str, by: str, splits: tuple[str, ...]) -> QuestionBenchmark:
    return QuestionBenchmark(
        summary=f"{dataset}: share of boxes with an intersection over union of at least 0.5",
        needs=dict.fromkeys((f"{dataset}/instances.json", f"{dataset}/refs({by}).p"), f"{dataset}.zip of {REFER}"),
        pictures={COCO: "http://images.cocodataset.org/zips/train2014.zip"},
        read=read_boxes(dataset, by),
        splits=splits,
        verdict=box_verdict,
        tabulate=mean_of("accuracy"),
        kind=lambda question: None,
        headline=("all", "accuracy"),
    )


ENTRIES = {
    "page-ocr": QuestionBenchmark(
        summary="dense pages of Fox: edit distance, F1, precision and recall of words, BLEU, METEOR",
        needs={"{split}_page_ocr.json": FOX},
        pictures={"{split}_pdf_png": FOX},
        read=read_pages,
        max_new_tokens=4096,
        splits=("en", "cn"),
        verdict=page_verdict,
        compat=lambda: compat_page,
        compat_note="answer and truth are exchanged, which exchanges precision and recall (Fox, GOT)",
        tabulate=tabulate_pages,
        remark=documents.meteor_remark,
        headline=("all", "edit_distance"),
    ),
    "refcoco": refcoco("refcoco", "unc", ("val", "testA", "testB")),
    "refcoco+": refcoco("refcoco+", "unc", ("val", "testA", "testB")),
    "refcocog": refcoco("refcocog", "umd", ("val", "test")),
}
BENCHMARKS = {name: entry.benchmark(name) for name, entry in ENTRIES.items()}
