"""The data section of a training job, and the objects that a loader needs from it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError, counted
from mindvlm.models.registry import record_formats
from mindvlm.processing.images.picture import branches_of
from mindvlm.training.datasets.annotation_index import AnnotationIndex
from mindvlm.training.datasets.augment import AugmentConfig
from mindvlm.training.datasets.collate import Collator
from mindvlm.training.datasets.grouping import GroupedMixture, record_lengths
from mindvlm.training.datasets.mixture import Mixture
from mindvlm.training.datasets.registry import choose_datasets, read_registry
from mindvlm.training.datasets.samples import LongAnswers, Processor, SampleOptions

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DatasetsConfig:
    """Annotated data sets.

    Attributes:
        registry: YAML of data sets, relative to the job's file.
        datasets: names joined by "+", or a list of names.
        weights: by name; they override those of the registry.
        batch_size: rows of a device in one pass.
        max_length: tokens of a sample; longer samples end at an earlier answer.
        long_answers: "cut" truncates a first answer that is too long, "skip" skips its sample.
        lengths: padded lengths in rising order, with one graph each; empty for multiples of `pad_multiple`.
        image_slots: the number of views, one for each image unless it is tiled, is padded to multiples of this; null is
            `batch_size`, 0 counts as 1. A list has one entry for each kind of view of the family.
        inspection: "stop" refuses a template that does not fit the tokenizer, and a data set of whose records most
            cannot be used, have no label or lose their picture; "warn" only says so. See `inspect_data`.
        bad_samples: "skip" lists samples that cannot be used, "stop" ends the run.
        num_workers: processes that make samples; 0 makes them in the trainer.
        look_ahead: batches made ahead of their use.
        group_by_modality: the rows of a pass have similar lengths, and all or none have images.
        index_folder: for the indexes of annotation files; null is beside them.
        augment: probabilities of changes to images; {} is those of the original, null is none.
    """

    registry: str
    datasets: str | list[str]
    weights: dict[str, float] = field(default_factory=dict)
    batch_size: int = 4
    max_length: int = 4096
    long_answers: LongAnswers = "cut"
    lengths: list[int] = field(default_factory=list)
    pad_multiple: int = 64
    image_slots: int | list[int] | None = None
    inspection: Literal["stop", "warn"] = "stop"
    bad_samples: Literal["skip", "stop"] = "skip"
    num_workers: int = 2
    look_ahead: int = 4
    group_by_modality: bool = False
    index_folder: str | None = None
    augment: AugmentConfig | None = None

    def __post_init__(self) -> None:
        for key in ("batch_size", "max_length", "pad_multiple", "look_ahead"):
            if getattr(self, key) < 1:
                raise UserError(f"data.{key} is {getattr(self, key)}; expected at least 1")
        slots = self.image_slots if isinstance(self.image_slots, list) else [self.image_slots or 0]
        for key, values in (("num_workers", [self.num_workers]), ("image_slots", slots)):
            if min(values, default=-1) < 0:
                raise UserError(f"data.{key} is {getattr(self, key)}; expected 0 or more")
        if self.lengths and (sorted(set(self.lengths)) != self.lengths or self.lengths[0] < 1):
            raise UserError(f"data.lengths is {self.lengths}; expected rising numbers")
        if self.lengths and self.lengths[-1] < self.max_length:
            raise UserError(
                f"data.lengths ends with {self.lengths[-1]} but data.max_length is {self.max_length}; append "
                f"{self.max_length} or lower data.max_length"
            )

    def slot_multiples(self, num_kinds: int) -> list[int]:
        """Returns `image_slots` for each kind of view. Raises UserError if it has another number of entries."""
        slots = self.batch_size if self.image_slots is None else self.image_slots
        slots = slots if isinstance(slots, list) else [slots] * num_kinds
        if len(slots) != num_kinds:
            needed = counted(num_kinds, "view kind")
            raise UserError(f"data.image_slots is {slots}, but the model has {needed}; give one entry for each")
        return slots

    def resolve_paths(self, config_path: Path) -> None:
        """Resolves paths that are relative to the job's file."""
        self.registry = resolve_path(self.registry, config_path)
        self.index_folder = resolve_path(self.index_folder, config_path)


def sample_options(
    config: DatasetsConfig,
    make_processor: Callable[[], Processor],
    *,
    seed: int,
    shuffle: bool = True,
    num_shards: int = 1,
) -> SampleOptions:
    """Reads the registry and indexes the annotation files.

    Args:
        make_processor: picklable, such as `partial(family.processor, processor_config)`.
        shuffle: False for evaluation, in the order of the files.
        num_shards: replicas of the job, on which the order of groups depends.

    Raises:
        UserError: see `read_registry`, `choose_datasets`, `AnnotationIndex`, `Mixture`.
    """
    entries = choose_datasets(read_registry(config.registry), config.datasets, weights=config.weights)
    formats = [record_formats()[entry.format] for entry in entries]
    indexes = [AnnotationIndex(entry.annotations, folder=config.index_folder) for entry in entries]
    arguments = [entry.name for entry in entries], list(map(len, indexes)), [entry.weight for entry in entries]
    if config.group_by_modality and shuffle:
        logger.info(f"counting the words of {sum(map(len, indexes))} records")
        lengths = list(map(record_lengths, indexes, formats))
        grouping = {"lengths": lengths, "batch_size": config.batch_size, "num_shards": num_shards}
        mixture = GroupedMixture(*arguments, seed=seed, **grouping)
    else:
        mixture = Mixture(*arguments, seed=seed, shuffle=shuffle)
    return SampleOptions(
        entries=entries,
        formats=formats,
        mixture=mixture,
        make_processor=make_processor,
        max_length=config.max_length,
        long_answers=config.long_answers,
        augment=config.augment,
        index_folder=config.index_folder,
    )


def make_collator(config: DatasetsConfig, processor: Processor) -> Collator:
    """Returns the collator of a job. Raises UserError if `image_slots` has not one entry for each kind of view."""
    # a picture of any size has every kind of view
    blank = processor.picture(Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)))
    kinds = tuple({tuple(branches_of(view)): None for view in blank.views})
    return Collator(
        pad_id=processor.tokenizer.pad_id,
        placeholder_id=processor.tokenizer.special_id(processor.image_span.placeholder),
        rows_per_view=processor.rows_per_view,
        kinds=kinds,
        pixel_shapes={name: array.shape for view in blank.views for name, array in branches_of(view).items()},
        has_choices=blank.num_fixed is not None,
        lengths=tuple(config.lengths),
        pad_multiple=config.pad_multiple,
        image_slots=tuple(config.slot_multiples(len(kinds))),
    )
