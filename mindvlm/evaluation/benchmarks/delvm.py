"""DeLVM's benchmarks: next codes of held-out sentences, and labels of held-out pictures."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.evaluation import picture_pairs
from mindvlm.evaluation.benchmark import Answer, Answered, BatchedQuestions, Benchmark, Scores, missing_note
from mindvlm.models.delvm.packing import MIN_LENGTH
from mindvlm.models.delvm.processor import DelvmProcessor, DelvmProcessorConfig
from mindvlm.models.delvm.token_files import TokenFile, lines_by_task
from mindvlm.processing.samples.token_metrics import TokenSums, token_figures

BATCH_SIZE = 16


def add_code_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch_size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="sentences over which the loss is averaged first, `micro_bsz` of the original (default %(default)s)",
    )
    parser.add_argument("--count_code_0", action="store_true", help="code 0 is a target, unlike in the original")


class CodeLines(BatchedQuestions):
    """The sentences of files of codes, by ids FILE:LINE. The files of a folder are a task.

    Raises:
        UserError: there are no files, an index cannot be used, or a task has no sentence that is long enough.
    """

    def __init__(self, data: Path, options: argparse.Namespace):
        if options.batch_size < 1:
            raise UserError(f"--batch_size is {options.batch_size}; expected at least 1")
        self.options = options
        self.settings = {"count_code_0": options.count_code_0}
        self.tasks = {
            task: {f"{path.relative_to(data)}:{number + 1}": (path, number) for path, number in places}
            for task, places in lines_by_task(data, MIN_LENGTH).items()
        }
        self.places = {question_id: place for places in self.tasks.values() for question_id, place in places.items()}
        self.ids = list(self.places)
        self.files: dict[Path, TokenFile] = {}
        self.scorer: Any = None

    def answer(self, model, ids: Sequence[str], folder: Path) -> Answered:
        """Computes the sums over the targets of sentences. See `BatchedQuestions.answer`."""
        # imported here: it imports MindSpore
        from mindvlm.models.delvm.line_scores import LineScorer

        lines = []
        for path, number in map(self.places.__getitem__, ids):
            if path not in self.files:
                self.files[path] = TokenFile(path, model.engine.config.vocab_size)
            lines.append(self.files[path][number])
        if self.scorer is None:
            graph_mode, ignores = model.config.mode == "graph", not self.options.count_code_0
            self.scorer = LineScorer(model.model, graph_mode=graph_mode, ignore_code_0=ignores)
        return Answered({key: vars(one) for key, one in zip(ids, self.scorer.score(lines), strict=True)})

    def score(self, answers: Mapping[str, Answer], folder: Path, output: Path) -> Scores:
        """Computes loss, accuracy and perplexity of each task. See `Questions.score`."""
        tables = {}
        for task, ids in self.tasks.items():
            sums = [sums_of(answers[question_id], question_id) for question_id in ids if question_id in answers]
            if figures := token_figures(sums, self.options.batch_size):
                tokens = sum(one.tokens for one in sums)
                tables[task] = {"model": {"sentences": len(sums), "tokens": tokens, **figures}}
        note = missing_note(answers, self.ids)
        return Scores(tables, notes=[note] if note else [])


def sums_of(answer: Answer, question_id: str) -> TokenSums:
    """Returns the sums that an answer holds. Raises UserError if it lacks one."""
    try:
        return TokenSums(float(answer["loss"]), int(answer["correct"]), int(answer["tokens"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"the answer to {question_id!r} has no numbers loss, correct and tokens; remove its line to make it again"
        ) from None


def open_pairs(data: Path, options: argparse.Namespace) -> picture_pairs.PicturePairs:
    return picture_pairs.PicturePairs(data, options, lambda size: DelvmProcessor(DelvmProcessorConfig(size=size)))


BENCHMARKS = {
    "delvm-codes": Benchmark(
        summary="loss, accuracy and perplexity of the next codes of held-out sentences",
        needs="files of codes TASK/NAME.bin, each with NAME.bin.meta",
        output="pictures",
        open=CodeLines,
        add_options=add_code_options,
    ),
    "delvm-pictures": Benchmark(
        summary="predicted labels of pictures beside the true ones: mIoU, PSNR, SSIM, MSE",
        needs="pairs of pictures TASK/NAME_img.png and TASK/NAME_label.png",
        output="pictures",
        open=open_pairs,
        add_options=picture_pairs.add_options,
    ),
}
