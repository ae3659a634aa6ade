"""Typed config of a training job."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RuntimeConfig
from mindvlm.nn.lora import LoraConfig
from mindvlm.parallel.mesh import ParallelConfig
from mindvlm.training.loss import LossScaleConfig
from mindvlm.training.optimizer import OptimizerConfig, check_patterns
from mindvlm.training.schedule import ScheduleConfig


@dataclass(kw_only=True)
class RenderedTextConfig:
    """Images of text, rendered on the fly.

    Attributes:
        batch_size: images per device and pass.
        queries: training questions; the answer is always the text.
        main_query_share: share of samples with the first question; the other questions share the rest.
        max_answer_tokens: characters of the longest text plus one for the end mark.
        curriculum_threshold: smoothed loss below which the next stage begins.
        num_workers: rendering processes.
        num_evaluation_images: images of unseen words for the error rate during training.
    """

    batch_size: int = 32
    queries: list[str] = field(default_factory=lambda: ["Provide the ocr results of this image."])
    main_query_share: float = 0.8
    max_answer_tokens: int = 33
    curriculum_threshold: float = 0.5
    num_workers: int = 1
    num_evaluation_images: int = 128

    def __post_init__(self):
        numbers = (self.batch_size, self.max_answer_tokens, self.num_workers, self.num_evaluation_images)
        if min(numbers) < 1 or not self.queries:
            raise UserError(
                "rendered_text: batch_size, max_answer_tokens, num_workers and num_evaluation_images must be at least "
                "1, and queries needs an entry"
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """Held-out records for evaluation during training.

    Attributes:
        datasets: names joined by "+", or a list of names.
        registry: YAML of data sets, relative to the job's file; null uses that of `data`.
        num_samples: at most this many, the first ones in the order of the files.
        batch_size: samples per batch.
        max_new_tokens: maximum length of an answer.
        num_shown: answers to print.
    """

    datasets: str | list[str]
    registry: str | None = None
    num_samples: int = 64
    batch_size: int = 8
    max_new_tokens: int = 512
    num_shown: int = 2
    FIGURES: ClassVar[tuple[str, ...]] = ("cer", "edit_distance")

    def __post_init__(self):
        for key in ("num_samples", "batch_size", "max_new_tokens"):
            check_at_least(f"evaluation.{key}", getattr(self, key), 1)
        check_at_least("evaluation.num_shown", self.num_shown, 0)

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.registry = resolve_path(self.registry, config_path)


@dataclass(kw_only=True)
class InitConfig:
    """Initial weights of a new run; a resumed run reads its checkpoint instead.

    Attributes:
        weights: checkpoints of any known naming, relative to the job's file; a later one overrides an earlier one.
            Empty: all weights are random.
        random: regular expressions; a parameter that no checkpoint has may be random if its name matches one.
    """

    weights: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class TrainConfig(RuntimeConfig):
    """A training job. Exactly one of `data` and `rendered_text` is set.

    `read_job` builds the sections `data` and `evaluation`: a `DatasetsConfig` and an `EvaluationConfig`, unless the
    family has its own.

    Attributes:
        family: that of the model; null: whichever the model config has.
        model_config: YAML of the model to train, or a Hugging Face folder with its config.json; relative to this file.
        model_changes: values that replace those of `model_config`, section by section (`processor: {template: plain}`);
            paths among them are relative to that file. If `model_config` is the folder of a language model alone,
            `vision_tower` is the folder of its tower.
        output_dir: folder of checkpoints and logs, relative to the working folder.
        resume: "auto" resumes from the newest checkpoint in `output_dir`, "never" refuses an existing checkpoint.
        freeze: regular expressions; parameters whose name matches one do not train.
        train: regular expressions; parameters whose name matches one train, even if `freeze`, `lora` or the model's
            config freezes them.
        lora: trains adapters and the parameters that match `train` or `lora.modules_to_save`; the rest is frozen.
        accumulation: passes per optimizer step; default 1.
        rows_per_step: rows per optimizer step over all devices and passes, instead of `accumulation`.
        averages_passes: the loss of a step is the mean of the means of its passes on each device, of those with labels,
            as in transformers' Trainer up to 4.45, instead of the mean over all labels of the step.
        loss_scale: dynamic loss scale of float16.
        recompute: keeps only the input of every block and computes the block again in the backward pass: less memory,
            more time.
        parallel: processes that train together.
        log_every, evaluate_every, save_every: in steps; the last step is always evaluated and saved.
        keep_checkpoints: number of newest checkpoints to keep, beside the best one.
        best: evaluation figure that selects the best checkpoint; null for none.
        max_nan_steps: consecutive steps without a finite loss, or without labels, after which the run stops.
        tensorboard: also write event files.
        own_sections: further sections of the family, by name.
    """

    family: str | None = None
    model_config: str
    model_changes: dict[str, Any] = field(default_factory=dict)
    output_dir: str
    resume: Literal["auto", "never"] = "auto"
    data: Any = None
    rendered_text: RenderedTextConfig | None = None
    evaluation: Any = None
    init: InitConfig = field(default_factory=InitConfig)
    freeze: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    accumulation: int | None = None
    rows_per_step: int | None = None
    averages_passes: bool = False
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    recompute: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log_every: int = 50
    evaluate_every: int = 1000
    save_every: int = 500
    keep_checkpoints: int = 2
    best: str | None = None
    max_nan_steps: int = 5
    tensorboard: bool = False
    own_sections: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self):
        for key in ("log_every", "evaluate_every", "save_every", "keep_checkpoints", "max_nan_steps"):
            check_at_least(key, getattr(self, key), 1)
        if (self.data is None) == (self.rendered_text is None):
            raise UserError("give one of the sections 'data' (annotated data sets) and 'rendered_text', and only one")
        if self.rendered_text and self.evaluation:
            raise UserError("evaluation belongs to 'data'; rendered_text evaluates num_evaluation_images, remove it")
        if self.best and not (self.evaluation or self.rendered_text):
            raise UserError(f"best is {self.best!r} but nothing is evaluated; add the section 'evaluation'")
        figures = (self.evaluation or EvaluationConfig).FIGURES
        if self.best and self.best not in figures:
            raise UserError(f"best is {self.best!r}; expected {' or '.join(figures)}")
        check_patterns("freeze", self.freeze)
        check_patterns("train", self.train)
        if self.lora:
            self.check_lora(self.lora)
        if self.accumulation is not None and self.rows_per_step is not None:
            raise UserError("give one of accumulation and rows_per_step, not both")
        if self.accumulation is not None:
            check_at_least("accumulation", self.accumulation, 1)
        if self.rows_per_step is not None:
            check_at_least("rows_per_step", self.rows_per_step, 1)

    def check_lora(self, lora: LoraConfig) -> None:
        """Raises UserError for settings that conflict with adapters."""
        check_patterns("lora.targets", lora.targets)
        check_patterns("lora.modules_to_save", lora.modules_to_save)
        if self.freeze:
            raise UserError("freeze has no effect with lora, which freezes everything but adapters; remove it")
        if not self.init.weights:
            raise UserError("lora adapts trained weights but init.weights is empty; name the weights there")

    @property
    def batch_size(self) -> int:
        """Rows per device and pass."""
        return (self.data or self.rendered_text).batch_size

    @property
    def num_passes(self) -> int:
        """Passes per optimizer step. Raises UserError if `rows_per_step` is not a multiple of the rows of one pass."""
        if self.rows_per_step is None:
            return self.accumulation or 1
        rows = self.batch_size * self.parallel.dp
        if self.rows_per_step % rows:
            raise UserError(
                f"rows_per_step is {self.rows_per_step} but one pass takes {rows} rows (batch_size {self.batch_size} x "
                f"parallel.dp {self.parallel.dp}); expected a multiple of it"
            )
        return self.rows_per_step // rows

    @property
    def num_rows(self) -> int:
        """Rows per optimizer step over all devices and passes."""
        return self.batch_size * self.parallel.dp * self.num_passes


def check_at_least(key: str, value: int, least: int) -> None:
    """Raises UserError if a value is too small."""
    if value < least:
        raise UserError(f"{key} is {value}; expected at least {least}")
