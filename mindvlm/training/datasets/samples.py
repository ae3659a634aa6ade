"""From the number of a sample to its ids, labels and pixels; runs in the worker processes.

C channels, H and W of a branch of the processor.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, load_image
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.training.datasets.annotation_index import AnnotationIndex
from mindvlm.training.datasets.augment import AugmentConfig, augment
from mindvlm.training.datasets.mixture import Mixture
from mindvlm.training.datasets.permutation import derive_key
from mindvlm.training.datasets.records import read_conversation
from mindvlm.training.datasets.registry import DatasetEntry
from mindvlm.training.datasets.truncation import LongAnswers, fit_sample


class Processor(Protocol):
    """What a family's processor has to offer; every `ChatProcessor` does."""

    config: Any
    tokenizer: Any
    image_span: Any
    template: Any
    cuts_samples: bool

    def training_sample(self, record: dict | list, *, max_length: int) -> TrainingSample: ...

    def pixels(self, image: Image.Image) -> Any:
        """An object whose attributes are arrays (C, H, W) float32, one a vision branch."""


@dataclass(frozen=True)
class Sample:
    """One sample before padding.

    Attributes:
        number: in the sequence of the mixture.
        input_ids, labels: (length,) int32; labels are not shifted.
        pixels: of each branch by its name ("clip", "high"), (num_images, C, H, W) float32.
        dataset, record: where it comes from.
    """

    number: int
    input_ids: np.ndarray
    labels: np.ndarray
    pixels: dict[str, np.ndarray]
    dataset: str
    record: int

    @property
    def num_images(self) -> int:
        """Pictures in it."""
        return len(next(iter(self.pixels.values()), ()))


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used: where it comes from (`line` of the annotation file), and why."""

    number: int
    dataset: str
    record: int
    line: int
    reason: str

    def __str__(self) -> str:
        return f"data set {self.dataset!r}, record {self.record} (line {self.line}): {self.reason}"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Everything that a worker needs to make samples; can be pickled.

    Attributes:
        entries: data sets in the order of the mixture.
        mixture: which record a number stands for.
        make_processor: called without arguments in each worker, such as `partial(family.processor, config)`.
        max_length: tokens; longer samples end earlier, see `fit_sample`.
        augment: None leaves pictures as they are.
        index_folder: of `AnnotationIndex`.
    """

    entries: Sequence[DatasetEntry]
    mixture: Mixture
    make_processor: Callable[[], Processor]
    max_length: int
    long_answers: LongAnswers = "cut"
    augment: AugmentConfig | None = None
    index_folder: str | None = None


class SampleMaker:
    """Makes any sample from its number."""

    def __init__(self, options: SampleOptions):
        self.options = options
        self.processor = options.make_processor()
        self.indexes = [AnnotationIndex(entry.annotations, folder=options.index_folder) for entry in options.entries]
        self.images_in_front = self.processor.template.style in ("caption", "plain")
        self.count_images = partial(self.processor.image_span.count, tokenizer=self.processor.tokenizer)

    def conversation(self, number: int) -> dict[str, Any]:
        """The record of sample `number` as `read_conversation` gives it. Raises UserError if it cannot be used."""
        place = self.options.mixture[number]
        record = self.indexes[place.dataset].read(place.record)
        format = self.options.entries[place.dataset].format
        return read_conversation(record, format, images_in_front=self.images_in_front)

    def make(self, number: int) -> Sample | Skipped:
        """Sample `number`, or why it cannot be used."""
        place = self.options.mixture[number]
        entry = self.options.entries[place.dataset]
        try:
            fitted = self.fitted(self.conversation(number))
            pixels = self.pixels(entry, fitted.images, number)
        except (UserError, OSError, UnicodeError) as error:
            line = self.indexes[place.dataset].place(place.record).line
            return Skipped(number, entry.name, place.record, line, str(error))
        return Sample(number, fitted.input_ids, fitted.labels, pixels, entry.name, place.record)

    def fitted(self, conversation: dict[str, Any]) -> TrainingSample:
        """Ids and labels within the length of a sample."""
        if self.processor.cuts_samples:
            return self.processor.training_sample(conversation, max_length=self.options.max_length)
        return fit_sample(
            conversation,
            self.processor.training_sample,
            max_length=self.options.max_length,
            count_images=self.count_images,
            long_answers=self.options.long_answers,
        )

    def pixels(self, entry: DatasetEntry, names: Sequence[str], number: int) -> dict[str, np.ndarray]:
        """Pixels of the pictures by branch; empty without pictures. Raises UserError for one that cannot be used."""
        if not names:
            return {}
        if entry.images is None:
            raise UserError(f"names the picture {names[0]!r}, but the registry gives the data set no images folder")
        branches: dict[str, list[np.ndarray]] = {}
        rng = np.random.Generator(np.random.PCG64(derive_key(self.options.mixture.seed, "augment", number)))
        max_pixels = getattr(self.processor.config, "max_pixels", DEFAULT_MAX_PIXELS)
        for name in names:
            image = load_image(Path(os.path.join(entry.images, name)), max_pixels=max_pixels)
            if self.options.augment is not None:
                image = augment(image, self.options.augment, rng)
            for branch, array in vars(self.processor.pixels(image)).items():
                if array is not None:
                    branches.setdefault(branch, []).append(array)
        return {branch: np.stack(arrays) for branch, arrays in branches.items()}
