"""Typed config of a training job."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mindvlm.config import build_config, read_yaml, resolve_path
from mindvlm.errors import UserError
from mindvlm.runtime import RuntimeConfig
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.schedule import ScheduleConfig


@dataclass(kw_only=True)
class RenderedTextConfig:
    """Pictures of text, rendered as they are needed.

    Attributes:
        batch_size: pictures a step.
        queries: questions to train with; the answer is always the text.
        main_query_share: share of the samples with the first question; the others share the rest.
        max_answer_tokens: characters of the longest text and the mark that ends it.
        curriculum_threshold: smoothed loss below which the next stage begins.
        num_workers: processes that render.
        num_evaluation_images: pictures of unseen words for the error rate while training.
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
                "data: batch_size, max_answer_tokens, num_workers and num_evaluation_images must be at least 1, "
                "and queries needs an entry"
            )


@dataclass(kw_only=True)
class TrainConfig(RuntimeConfig):
    """A training job.

    Attributes:
        model_config: YAML of the model to train, relative to this file.
        output_dir: where state and weights go, relative to the working folder.
        resume: "auto" goes on from the state in `output_dir` if there is one, "never" refuses to find one.
        log_every, evaluate_every, save_every: in steps.
    """

    family: Literal["vary"] = "vary"
    model_config: str
    output_dir: str
    resume: Literal["auto", "never"] = "auto"
    data: RenderedTextConfig = field(default_factory=RenderedTextConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    log_every: int = 50
    evaluate_every: int = 1000
    save_every: int = 500

    def __post_init__(self):
        if min(self.log_every, self.evaluate_every, self.save_every) < 1:
            raise UserError("log_every, evaluate_every and save_every must be at least 1")


def read_train_config(path: str | Path) -> TrainConfig:
    """Reads a job's YAML.

    Raises:
        UserError: the file is missing or malformed, or a key or value is impossible.
    """
    path = Path(path)
    config = build_config(TrainConfig, read_yaml(path))
    config.model_config = resolve_path(config.model_config, path)
    return config
