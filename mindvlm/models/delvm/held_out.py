"""Evaluation of held-out sentences of codes while the decoder trains."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.line_scores import LineScorer
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.packing import MIN_LENGTH
from mindvlm.models.delvm.token_files import TokenFile, lines_by_task
from mindvlm.models.own_training import Evaluation
from mindvlm.processing.samples.token_metrics import TokenSums, token_figures


@dataclass(kw_only=True)
class HeldOutConfig:
    """Held-out files of codes, the section `evaluation` of a job.

    Attributes:
        codes: folder with the files, relative to the job's file; the files of each folder in it are a task.
        num_lines: sentences of each task to read; 0 for all.
        batch_size: sentences over which the loss is averaged first.
        min_length: shorter sentences are left out.
    """

    codes: str
    num_lines: int = 0
    batch_size: int = 16
    min_length: int = MIN_LENGTH
    FIGURES: ClassVar[tuple[str, ...]] = ("val_loss", "val_perplexity")

    def __post_init__(self) -> None:
        for key, least in (("num_lines", 0), ("batch_size", 1), ("min_length", 2)):
            if getattr(self, key) < least:
                raise UserError(f"evaluation.{key} is {getattr(self, key)}; expected at least {least}")

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.codes = resolve_path(self.codes, config_path)


class HeldOutCodes:
    """Loss, accuracy and perplexity of the next codes of held-out sentences, of each task and of all.

    Args:
        config: the section `evaluation` of the job.
        data: the section `data` of the job, which says whether code 0 is a target.
        run_config: of the model.
        model: of the training step.
        graph_mode: whether Cells are compiled.

    Raises:
        UserError: there are no files, one is damaged, or no sentence is long enough.
    """

    def __init__(self, config: HeldOutConfig, data: Any, run_config: Any, model: DelvmModel, *, graph_mode: bool):
        self.batch_size = config.batch_size
        self.scorer = LineScorer(model, graph_mode=graph_mode, ignore_code_0=data.ignore_code_0)
        vocab_size, self.tasks = run_config.model.language_model.vocab_size, {}
        files: dict[Path, TokenFile] = {}
        for task, places in lines_by_task(Path(config.codes), config.min_length).items():
            chosen = list(islice(places, config.num_lines or None))
            files |= {path: TokenFile(path, vocab_size) for path, _ in chosen if path not in files}
            self.tasks[task] = [files[path][number] for path, number in chosen]

    def evaluate(self) -> Evaluation:
        """Returns `val_loss`, `val_accuracy` and `val_perplexity`, and those of each task as `val_loss/TASK`."""
        figures: dict[str, float] = {}
        every: list[TokenSums] = []
        for task, lines in self.tasks.items():
            sums = list(self.scorer.score(lines))
            figures |= {f"val_{key}/{task}": value for key, value in token_figures(sums, self.batch_size).items()}
            every += sums
        return Evaluation(
            {f"val_{key}": value for key, value in token_figures(every, self.batch_size).items()} | figures
        )
