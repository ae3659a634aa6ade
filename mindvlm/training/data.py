"""Batches of annotated data sets."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mindvlm.models.own_training import PassInputs, text_inputs
from mindvlm.training.datasets.config import DatasetsConfig, make_collator, sample_options
from mindvlm.training.datasets.inspection import inspect_data
from mindvlm.training.datasets.loader import BatchLoader, Share, merge_states
from mindvlm.training.datasets.skip_log import SkipLog

logger = logging.getLogger(__name__)


class AnnotatedData:
    """Batches of annotated data sets.

    Args:
        config: the section `data` of the job.
        processor_type, processor_config: processor of the model; both can be pickled.
        seed: seed of the order.
        share: share of this process.
        skip_list: file that lists skipped samples; None only counts them.

    Raises:
        UserError: see `sample_options` and `inspect_data`.
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
    ):
        make_processor = partial(processor_type, processor_config)
        self.config, self.share = config, share
        processor = make_processor()
        self.collator = make_collator(config, processor)
        self.options = sample_options(config, make_processor, seed=seed, num_shards=share.num_shards)
        self.findings = inspect_data(self.options, processor, stops=config.inspection == "stop")
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
        for line in self.findings:
            logger.info(line)
        skip_log = SkipLog(self.skip_list)
        options = {"skip_log": skip_log, "state": state}
        self.loader = BatchLoader(self.options, self.collator, self.config, self.share, **options)

    def take(self) -> list[PassInputs]:
        batches = [self.loader.take() for _ in range(self.share.num_passes)]
        return [
            text_inputs(
                batch.input_ids,
                batch.labels,
                batch.sources,
                tuple(batch.pixels.values()),
                batch.num_tokens,
                [self.origin(number) for number in batch.numbers],
                batch.choices,
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
