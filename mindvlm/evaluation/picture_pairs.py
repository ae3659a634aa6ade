"""Questions about pairs of a picture and its label: a model sees some pairs of a task, and labels the other pictures.

DATA/TASK/NAME_img.png, NAME_label.png, or one task's pairs in DATA itself
FOLDER/predictions/TASK/NAME.png, FOLDER/reconstructions/TASK/NAME.png, FOLDER/grid.png
"""

import argparse
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError, counted
from mindvlm.evaluation import picture_metrics as metrics
from mindvlm.evaluation.benchmark import Answer, Answered, BatchedQuestions, Scores, missing_note
from mindvlm.processing.code_processor import LABEL, PICTURE, CodeProcessor, find_pairs, labelled_grid
from mindvlm.processing.images.loading import load_image

Pair = tuple[Path, Path]
PREDICTION, COPY, CEILING = "prediction", "copy of the nearest example's label", "reconstruction of the label"
# of 255; the darkest pure colour, blue, has the grey level 29
THRESHOLD = 20
NUM_PROMPTS = 3
GRID_FILE = "grid.png"
# smaller pictures are enlarged in a grid
GRID_EDGE = 128
LINE_TOLERANCE = 2
# key of an answer -> folder of its pictures
FOLDERS = {"picture": "predictions", "reconstruction": "reconstructions"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="folders of --data to use (default: all)")
    parser.add_argument("--num_prompts", type=int, metavar="N", help="pairs of --data drawn as examples (default 3)")
    parser.add_argument("--seed", type=int, help="of drawn examples (default 0)")
    parser.add_argument(
        "--prompt_pairs",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="examples, in FOLDER/TASK or FOLDER, in place of drawn ones",
    )
    parser.add_argument("--num_queries", type=int, default=0, metavar="N", help="of each task; 0 (default): all")
    parser.add_argument(
        "--threshold",
        type=int,
        default=THRESHOLD,
        help="grey level of 255 from which foreground_iou counts (%(default)s)",
    )
    parser.add_argument(
        "--grid", type=int, default=0, metavar="N", help="also write grid.png with the first N questions of each task"
    )
    parser.add_argument(
        "--masks",
        nargs="+",
        metavar="TASK",
        help="tasks whose labels are masks (default: those with at most 8 colours)",
    )


class PicturePairs(BatchedQuestions):
    """The pictures to label, by ids TASK/NAME.

    Args:
        data: folder of the pairs.
        options: of `add_options`.
        make_processor: returns the processor for pictures of an edge in pixels.

    Attributes:
        prompts: the examples of each task.

    Raises:
        UserError: a folder has no pairs, or too few for the examples and a question.
    """

    def __init__(self, data: Path, options: argparse.Namespace, make_processor: Callable[[int], CodeProcessor]):
        if not 0 <= options.threshold <= 255:
            raise UserError(f"--threshold is {options.threshold}; expected 0 to 255")
        for name, least in (("num_prompts", 1), ("seed", 0), ("num_queries", 0), ("grid", 0)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; expected at least {least}")
            if value is not None and options.prompt_pairs and name in ("num_prompts", "seed"):
                raise UserError(f"--{name} has no effect with --prompt_pairs; leave one of them out")
        self.num_prompts, self.seed = options.num_prompts or NUM_PROMPTS, options.seed or 0
        self.options, self.make_processor = options, make_processor
        tasks = find_tasks(data)
        chosen = options.tasks or list(tasks)
        for name in (*chosen, *(options.masks or ())):
            if name not in tasks:
                raise UserError(f"{data}: holds no task {name!r}; it has {', '.join(tasks)}")
        self.prompts: dict[str, list[Pair]] = {}
        self.queries: dict[str, Pair] = {}
        for task in dict.fromkeys(chosen):
            self._divide(task, tasks[task])
        self.ids = list(self.queries)
        if options.prompt_pairs:
            self.settings = {"prompt_pairs": Path(options.prompt_pairs).resolve().name}
        else:
            self.settings = {"num_prompts": self.num_prompts, "seed": self.seed}

    def _divide(self, task: str, folder: Path) -> None:
        """Chooses the examples and the queries of a task."""
        pairs, options = find_pairs(folder), self.options
        if options.prompt_pairs:
            beside = Path(options.prompt_pairs) / task
            prompts = find_pairs(beside if beside.is_dir() else options.prompt_pairs)
        else:
            if len(pairs) <= self.num_prompts:
                raise UserError(
                    f"{folder}: holds {counted(len(pairs), 'pair')}, too few for {self.num_prompts} examples and a "
                    "question; add pairs, lower --num_prompts, or give examples with --prompt_pairs"
                )
            rng = np.random.default_rng([self.seed, zlib.crc32(task.encode())])
            prompts = [pairs[number] for number in rng.choice(len(pairs), self.num_prompts, replace=False)]
        shown = {picture.resolve() for picture, _ in prompts}
        asked = [pair for pair in pairs if pair[0].resolve() not in shown]
        if not asked:
            raise UserError(f"{folder}: all pairs are examples; add others")
        self.prompts[task] = prompts
        for pair in asked[: options.num_queries or None]:
            self.queries[f"{task}/{pair[0].stem.removesuffix(PICTURE)}"] = pair

    def answer(self, model: Any, ids: Sequence[str], folder: Path) -> Answered:
        """Labels pictures. See `BatchedQuestions.answer`."""
        found, codes = Answered(), {}
        capacity = model.engine.max_length // model.num_codes
        for task in dict.fromkeys(map(task_of, ids)):
            if 2 * len(self.prompts[task]) + 2 > capacity:
                raise UserError(
                    f"{task}: {counted(len(self.prompts[task]), 'example pair')}, a question and its label exceed the "
                    f"context of {capacity} pictures; lower --num_prompts, or give fewer --prompt_pairs"
                )
        for question_id in ids:
            try:
                codes[question_id] = encode_pair(model, self.queries[question_id])
            except UserError as error:
                found.errors[question_id] = str(error)
        shown = {task: [encode_pair(model, pair) for pair in self.prompts[task]] for task in map(task_of, codes)}
        # all tasks together, because every number of prompts has a graph
        prompts = [np.concatenate([*shown[task_of(key)], codes[key][0]], None).tolist() for key in codes]
        # greedy, so that a resumed run predicts the same pictures
        predicted = model.continue_codes(prompts, model.num_codes, do_sample=False) if prompts else []
        for question_id, new in zip(codes, predicted, strict=True):
            pictures = dict(zip(FOLDERS, model.decode([new, codes[question_id][1]]), strict=True))
            found.answers[question_id] = {key: f"{FOLDERS[key]}/{question_id}.png" for key in pictures}
            for key, picture in pictures.items():
                write_picture(folder / found.answers[question_id][key], picture)
        return found

    def score(self, answers: Mapping[str, Answer], folder: Path, output: Path) -> Scores:
        """Computes the metrics of each task. See `Questions.score`."""
        by_task: dict[str, dict[str, Answer]] = {}
        for question_id in self.ids:
            if question_id in answers:
                by_task.setdefault(task_of(question_id), {})[question_id] = answers[question_id]
        tables = {task: self._score_task(task, found, folder) for task, found in by_task.items()}
        if self.options.grid and by_task:
            rows = [row for task, found in by_task.items() for row in self._grid_rows(task, found, folder)]
            write_picture(folder / GRID_FILE, labelled_grid(rows))
        note = missing_note(answers, self.ids)
        return Scores(tables, notes=[note] if note else [])

    def _grid_rows(self, task: str, answers: dict[str, Answer], folder: Path) -> list[list[tuple[str, Image.Image]]]:
        """Returns a row of captions and pictures for each of the first answers: examples, question, result, truth."""
        rows = []
        for question_id, answer in list(answers.items())[: self.options.grid]:
            result = Image.fromarray(read_picture(folder, answer, "picture", question_id))
            processor = self.make_processor(result.width)
            picture, truth = map(processor.squared, self.queries[question_id])
            row = [("question", picture), ("prediction", result), ("truth", truth)]
            for number, pair in reversed(list(enumerate(self.prompts[task], 1))):
                row = [(f"{task} {number}", processor.squared(pair[0])), ("label", processor.squared(pair[1])), *row]
            factor = max(1, GRID_EDGE // result.width)
            size = (factor * result.width, factor * result.height)
            rows.append([(caption, one.resize(size, Image.Resampling.NEAREST)) for caption, one in row])
        return rows

    def _score_task(self, task: str, answers: dict[str, Answer], folder: Path) -> dict[str, dict[str, float]]:
        named = {PREDICTION: "picture"}
        named |= {CEILING: "reconstruction"} if all("reconstruction" in answer for answer in answers.values()) else {}
        rows = {
            row: {key: read_picture(folder, answer, name, key) for key, answer in answers.items()}
            for row, name in named.items()
        }
        sizes = {picture.shape for pictures in rows.values() for picture in pictures.values()}
        if len(sizes) > 1 or any(height != width for height, width, _ in sizes):
            raise UserError(f"{folder}: pictures of {task} have the sizes {sorted(sizes)}; expected one square size")
        processor = self.make_processor(sizes.pop()[0])

        def load(path: Path) -> np.ndarray:
            return np.asarray(processor.squared(path))

        truths = {key: load(self.queries[key][1]) for key in answers}
        shown = [(load(picture), load(label)) for picture, label in self.prompts[task]]
        copies = {key: nearest_label(load(self.queries[key][0]), shown) for key in answers}
        rows = {PREDICTION: rows.pop(PREDICTION), COPY: copies, **rows}
        # a label that is scaled to the model's size has more colours
        colours = metrics.palette(np.asarray(load_image(self.queries[key][1])) for key in answers)
        is_mask = colours is not None if self.options.masks is None else task in self.options.masks
        threshold = self.options.threshold if is_mask else None
        return {
            row: picture_figures([pictures[key] for key in answers], list(truths.values()), colours, threshold)
            for row, pictures in rows.items()
        }


def picture_figures(
    predicted: Sequence[np.ndarray], truths: Sequence[np.ndarray], colours: np.ndarray | None, threshold: int | None
) -> dict[str, float]:
    """Returns the metrics of predicted pictures, each (H, W, 3) uint8, beside the true ones.

    Args:
        colours: of the labels, (classes, 3), see `palette`; None if they have too many for classes.
        threshold: of the foreground of masks; None if the labels are no masks.
    """
    pairs = list(zip(predicted, truths, strict=True))
    figures: dict[str, float] = {"pictures": len(pairs)}
    if threshold is not None:
        if colours is not None:
            classes = [[metrics.nearest_class(one, colours) for one in pair] for pair in pairs]
            figures["miou"] = metrics.mean_iou(sum(metrics.overlaps(*pair, len(colours)) for pair in classes))
            if len(colours) == 2:
                lines = sum(metrics.line_matches(*(one == 1 for one in pair), LINE_TOLERANCE) for pair in classes)
                figures["line_f1"] = metrics.f1(lines)
        masks = [[metrics.foreground(one, threshold).astype(int) for one in pair] for pair in pairs]
        figures["foreground_iou"] = metrics.mean_iou(sum(metrics.overlaps(*pair, 2) for pair in masks)[:, 1:])
    for name, metric in (("mse", metrics.mean_squared_error), ("psnr", metrics.psnr), ("ssim", metrics.ssim)):
        figures[name] = float(np.mean([metric(*pair) for pair in pairs]))
    return figures


def find_tasks(data: Path) -> dict[str, Path]:
    """Returns task -> folder of its pairs: the folder itself, or those in it. Raises UserError if there are none."""

    def has_pairs(folder: Path) -> bool:
        return any(path.stem.endswith((PICTURE, LABEL)) for path in folder.iterdir())

    if not data.is_dir() or has_pairs(data):
        return {data.resolve().name: data}
    folders = {path.name: path for path in sorted(data.iterdir()) if path.is_dir() and has_pairs(path)}
    if not folders:
        raise UserError(
            f"{data}: holds no pairs NAME{PICTURE}.png and NAME{LABEL}.png, nor folders of some; give such a folder"
        )
    return folders


def task_of(question_id: str) -> str:
    return question_id.rpartition("/")[0]


def nearest_label(query: np.ndarray, shown: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the label of the example whose picture has the smallest mean squared difference to a query."""
    return min(shown, key=lambda pair: metrics.mean_squared_error(pair[0], query))[1]


def encode_pair(model: Any, pair: Pair) -> np.ndarray:
    """Returns the codes (2, P) of a picture and its label.

    Raises:
        UserError: a picture cannot be read or encoded, or the two differ in size, so that squares cut out of them would
            not match.
    """
    sizes = [load_image(path).size for path in pair]
    if sizes[0] != sizes[1]:
        first, second = ("x".join(map(str, size)) for size in sizes)
        raise UserError(f"{pair[0]} has {first} pixels but {pair[1].name} {second}; give both the same size")
    return model.encode(pair)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG, which appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, "PNG")


def read_picture(folder: Path, answer: Answer, key: str, question_id: str) -> np.ndarray:
    """Returns the picture (H, W, 3) uint8 that an answer names. Raises UserError if there is none."""
    if not isinstance(answer.get(key), str):
        raise UserError(f"the answer to {question_id!r} names no {key}; expected the path of a PNG")
    return np.asarray(load_image(folder / answer[key]))
