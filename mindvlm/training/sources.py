"""Where the batches of a job come from: annotated data sets, or text rendered on the fly under a curriculum.

B rows, L tokens, N pictures, C channels, H and W of a branch.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.curriculum import STAGES, TRAINING_STAGES, Curriculum
from mindvlm.nn.splice import splice_sources
from mindvlm.training.config import RenderedTextConfig
from mindvlm.training.data import BackgroundBatches, Batch, RenderedTextBatches
from mindvlm.training.datasets.config import DatasetsConfig, make_collator, sample_options
from mindvlm.training.datasets.loader import BatchLoader, merge_states
from mindvlm.training.datasets.skip_log import SkipLog


@dataclass(frozen=True)
class PassInputs:
    """What a model takes in one pass.

    Attributes:
        input_ids, labels: (B, L) int32.
        sources: (B, L) int32, see `splice_sources`.
        pixels: (N, C, H, W) float32 of each vision branch, in the order of the model's arguments.
        num_tokens: tokens that are not fill.
        origins: where each row comes from.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    pixels: tuple[np.ndarray, ...]
    num_tokens: int
    origins: list[str]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every step is this process's.

    Attributes:
        shard, num_shards: this replica and the number of them.
        num_passes: passes of one optimizer step.
    """

    shard: int = 0
    num_shards: int = 1
    num_passes: int = 1


class Source(Protocol):
    """The batches of one process in a fixed order, from any step on.

    Attributes:
        rows_per_epoch: None without an end.
        identity: what must be the same for a run to go on, by name.
        num_skipped: samples that could not be used so far.
        figures: what a log line says about the place in the data.
        state: where the source stands between two steps, for JSON.
    """

    rows_per_epoch: int | None
    identity: dict[str, Any]
    num_skipped: int
    figures: dict[str, float]
    state: dict[str, Any]

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        """Starts the processes that make the batches of `step` and those after it."""

    def take(self) -> list[PassInputs]:
        """The passes of the next step."""

    def observe(self, loss: float) -> str | None:
        """Hears the loss of a step; what is to be said about it."""

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The states of all replicas as one that each of them can start from."""

    def close(self) -> None:
        """Ends the processes."""


class DatasetsSource:
    """Annotated data sets.

    Args:
        config: of the job.
        processor_type, processor_config: of the model; both can be pickled.
        seed: of the order.
        share: of this process.
        skip_list: file of what is skipped; None only counts.
        say: takes lines of progress.

    Raises:
        UserError: see `sample_options`.
    """

    def __init__(
        self,
        config: DatasetsConfig,
        processor_type: Callable,
        processor_config: Any,
        *,
        seed: int,
        share: Share,
        skip_list: Path | None,
        say: Callable[[str], None],
    ):
        make_processor = partial(processor_type, processor_config)
        self.config, self.share, self.say = config, share, say
        self.collator = make_collator(config, make_processor())
        self.options = sample_options(config, make_processor, seed=seed, num_shards=share.num_shards, say=say)
        self.rows_per_epoch = self.options.mixture.epoch_size
        mixture = self.options.mixture
        self.identity = {f"records of {name}": size for name, size in zip(mixture.names, mixture.sizes, strict=True)}
        for entry in self.options.entries:
            self.identity |= {f"weight of {entry.name}": entry.weight, f"format of {entry.name}": entry.format}
        if config.group_by_modality:
            self.identity |= {"batch size of the groups": config.batch_size, "replicas of the groups": share.num_shards}
        self.skip_list = skip_list
        self.loader: BatchLoader | None = None

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        self.loader = BatchLoader(
            self.options,
            self.collator,
            batch_size=self.config.batch_size,
            shard=self.share.shard,
            num_shards=self.share.num_shards,
            accumulation=self.share.num_passes,
            num_workers=self.config.num_workers,
            look_ahead=self.config.look_ahead,
            bad_samples=self.config.bad_samples,
            skip_log=SkipLog(self.skip_list, say=self.say),
            state=state,
        )

    def take(self) -> list[PassInputs]:
        batches = [self.loader.take() for _ in range(self.share.num_passes)]
        return [
            PassInputs(
                batch.input_ids,
                batch.labels,
                batch.sources,
                tuple(batch.pixels.values()),
                batch.num_tokens,
                [self.origin(number) for number in batch.numbers],
            )
            for batch in batches
        ]

    def origin(self, number: int) -> str:
        place = self.options.mixture[number]
        return f"sample {number}: data set {self.options.entries[place.dataset].name!r}, record {place.record}"

    def observe(self, loss: float) -> None:
        return None

    @property
    def num_skipped(self) -> int:
        return self.loader.skip_log.num_skipped

    @property
    def figures(self) -> dict[str, float]:
        return {"epoch": round(self.loader.epoch, 4)}

    @property
    def state(self) -> dict[str, Any]:
        return self.loader.state

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return merge_states(states)

    def close(self) -> None:
        if self.loader:
            self.loader.close()


class RenderedTextSource:
    """Pictures of text, from easy ones to all.

    Args:
        config: of the job.
        processor_type, processor_config: of the model; both can be pickled.
        seed: of the pictures.
        share: of this process.
    """

    rows_per_epoch = None
    num_skipped = 0
    identity: dict[str, Any] = {}

    def __init__(
        self, config: RenderedTextConfig, processor_type: Callable, processor_config: Any, *, seed: int, share: Share
    ):
        self.config, self.share = config, share
        self.options = dict(
            processor_type=processor_type,
            processor_config=processor_config,
            queries=config.queries,
            main_query_share=config.main_query_share,
            batch_size=config.batch_size,
            max_answer_tokens=config.max_answer_tokens,
            seed=seed,
        )
        self.batches = RenderedTextBatches(**self.options)
        self.curriculum = Curriculum(threshold=config.curriculum_threshold)
        self.background: BackgroundBatches | None = None

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        ordered = []
        if state:
            if len(state["ordered_stages"]) % self.share.num_passes:
                raise UserError("the curriculum cannot go on with another number of passes a step; set accumulation")
            self.curriculum = replace(Curriculum(**state["curriculum"]), threshold=self.config.curriculum_threshold)
            ordered = state["ordered_stages"]
        self.background = BackgroundBatches(
            self.options,
            stages=TRAINING_STAGES,
            num_workers=self.config.num_workers,
            first=step * self.share.num_passes,
            ordered_stages=ordered,
            shard=self.share.shard,
            num_shards=self.share.num_shards,
        )

    def take(self) -> list[PassInputs]:
        taken = [self.background.take(self.curriculum.stage) for _ in range(self.share.num_passes)]
        return [self.inputs(batch) for batch in taken]

    def inputs(self, batch: Batch) -> PassInputs:
        """One batch as a model takes it."""
        span = self.batches.processor.image_span
        placeholder_id = self.batches.processor.tokenizer.special_id(span.placeholder)
        answers = int((batch.labels != -100).sum())
        return PassInputs(
            batch.input_ids,
            batch.labels,
            splice_sources(batch.input_ids, len(batch.input_ids), span.num_tokens, placeholder_id),
            batch.pixels,
            int(batch.prompt_lengths.sum()) + answers,
            [f"text {text!r}" for text in batch.texts],
        )

    def observe(self, loss: float) -> str | None:
        if self.curriculum.update(loss):
            return f"stage {self.curriculum.stage} of {len(STAGES) - 1} begins"
        return None

    @property
    def figures(self) -> dict[str, float]:
        return {"stage": self.curriculum.stage}

    @property
    def state(self) -> dict[str, Any]:
        return {"curriculum": asdict(self.curriculum), "ordered_stages": list(self.background.ordered_stages)}

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return states[0]

    def close(self) -> None:
        if self.background:
            self.background.close()
