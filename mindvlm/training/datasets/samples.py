"""Makes the ids, labels and pictures of a sample from its number, in the worker processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.image_span import IMAGE_MARKER
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL, TrainingSample
from mindvlm.processing.samples.record_formats import RecordFormat
from mindvlm.training.datasets.annotation_index import AnnotationIndex
from mindvlm.training.datasets.augment import AugmentConfig, augment
from mindvlm.training.datasets.mixture import Mixture, derive_key
from mindvlm.training.datasets.records import read_conversation
from mindvlm.training.datasets.registry import DatasetEntry

LongAnswers = Literal["cut", "skip"]
WHOLE = 1 << 30


class Processor(Protocol):
    """The interface of a family's processor that samples need; every `ChatProcessor` has it."""

    max_pixels: int
    tokenizer: Any
    image_span: Any
    template: Any
    cuts_samples: bool
    lengths_differ: bool
    rows_per_view: int

    def training_sample(
        self, record: dict | list, *, max_length: int, image_lengths: Sequence[int] | None = None
    ) -> TrainingSample: ...

    def picture(self, image: Image.Image) -> Picture: ...


@dataclass(frozen=True)
class Sample:
    """One sample before padding.

    Attributes:
        number: position in the sequence of the mixture.
        input_ids, labels: (length,) int32; labels are not shifted.
        pictures: in the order of their placeholders.
        dataset, record: the origin.
    """

    number: int
    input_ids: np.ndarray
    labels: np.ndarray
    pictures: tuple[Picture, ...]
    dataset: str
    record: int


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used: its origin (`line` of the annotation file) and the reason."""

    number: int
    dataset: str
    record: int
    line: int
    reason: str

    def __str__(self) -> str:
        return f"data set {self.dataset!r}, record {self.record} (line {self.line}): {self.reason}"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The picklable settings from which a worker makes samples.

    Attributes:
        entries: data sets in the order of the mixture.
        formats: format of each data set's records.
        mixture: maps a number to a record.
        make_processor: called without arguments in each worker, such as `partial(family.processor, config)`.
        max_length: in tokens; longer samples end earlier, see `fit_sample`.
        augment: None does not change images.
        index_folder: of `AnnotationIndex`.
    """

    entries: Sequence[DatasetEntry]
    formats: Sequence[RecordFormat]
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
        """Returns the record of sample `number` from `read_conversation`. Raises UserError if it cannot be used."""
        place = self.options.mixture[number]
        record = self.indexes[place.dataset].read(place.record)
        return self.read(place.dataset, record)

    def read(self, dataset: int, record: Any) -> dict[str, Any]:
        """Returns a record of a data set from `read_conversation`."""
        return read_conversation(record, self.options.formats[dataset], images_in_front=self.images_in_front)

    def make(self, number: int) -> Sample | Skipped:
        """Makes sample `number`, or says why it cannot be used."""
        place = self.options.mixture[number]
        entry = self.options.entries[place.dataset]
        try:
            conversation = self.conversation(number)
            # their lengths decide how many turns fit
            pictures = self.pictures(entry, conversation["image"], number) if self.processor.lengths_differ else None
            fitted = self.fitted(conversation, pictures)
            if pictures is None:
                pictures = self.pictures(entry, fitted.images, number)
        except (UserError, OSError, UnicodeError) as error:
            line = self.indexes[place.dataset].place(place.record).line
            return Skipped(number, entry.name, place.record, line, str(error))
        pictures = pictures[: len(fitted.images)]
        return Sample(number, fitted.input_ids, fitted.labels, pictures, entry.name, place.record)

    def fitted(self, conversation: dict[str, Any], pictures: Sequence[Picture] | None = None) -> TrainingSample:
        """Returns ids and labels of at most `max_length` tokens.

        Args:
            conversation: of `read_conversation`.
            pictures: those of the conversation if their lengths differ.

        Raises:
            UserError: the sample does not fit, has no label (only an original rule keeps such a sample in its batch),
                or the template shows another number of pictures.
        """
        lengths = None if pictures is None else [len(picture.layout) for picture in pictures]
        max_length = self.options.max_length
        make_sample = partial(self.processor.training_sample, image_lengths=lengths)
        if self.processor.cuts_samples:
            sample = make_sample(conversation, max_length=max_length)
        else:
            sample = fit_sample(
                conversation,
                make_sample,
                max_length=max_length,
                count_images=partial(self.count_images, lengths=lengths),
                long_answers=self.options.long_answers,
            )
            if not (sample.labels[1:] != IGNORED_LABEL).any():
                raise UserError("has no token to learn; give it an answer")
        num_places = self.count_images(sample.input_ids, lengths=lengths)
        if num_places != len(sample.images):
            named = counted(len(sample.images), "picture")
            raise UserError(f"{named}, but the template shows {num_places}; keep one <image> for each")
        return sample

    def pictures(self, entry: DatasetEntry, names: Sequence[str], number: int) -> tuple[Picture, ...]:
        """Returns the pictures of a sample. Raises UserError for an image that cannot be used."""
        require_folder(entry, names)
        found = []
        rng = np.random.Generator(np.random.PCG64(derive_key(self.options.mixture.seed, "augment", number)))
        for name in names:
            image = load_image(name, folder=entry.images, max_pixels=self.processor.max_pixels)
            if self.options.augment is not None:
                image = augment(image, self.options.augment, rng)
            found.append(self.processor.picture(image))
        return tuple(found)


def require_folder(entry: DatasetEntry, names: Sequence[str]) -> None:
    """Raises UserError for pictures of a data set without images folder."""
    if names and entry.images is None:
        raise UserError(f"names the picture {names[0]!r}, but the registry gives the data set no images folder")


def fit_sample(
    conversation: dict[str, Any],
    make_sample: Callable[..., TrainingSample],
    *,
    max_length: int,
    count_images: Callable[[np.ndarray], int],
    long_answers: LongAnswers = "cut",
) -> TrainingSample:
    """Returns the sample of as many whole turns as fit in `max_length` tokens, with their images; no image is cut.

    Args:
        conversation: of `read_conversation`.
        make_sample: `training_sample` of a processor.
        count_images: returns the number of images that begin within ids.
        long_answers: if the first answer does not fit, "cut" truncates it and omits its closing mark, so that the model
            does not learn to stop early, unless the family has another rule; "skip" refuses the sample.

    Raises:
        UserError: no token of the first answer fits ("skip": not the whole answer).
    """
    sample = make_sample(conversation, max_length=WHOLE)
    if len(sample.input_ids) <= max_length:
        return sample
    is_learned = sample.labels != IGNORED_LABEL
    ends = np.flatnonzero(is_learned & ~np.append(is_learned[1:], False)) + 1
    fitting = ends[ends <= max_length]
    if len(fitting):
        length = int(fitting[-1])
        ids, labels = sample.input_ids[:length], sample.labels[:length]
        return replace(sample, input_ids=ids, labels=labels, images=sample.images[: count_images(ids)])
    if long_answers == "skip" or int(np.argmax(is_learned)) >= max_length:
        raise UserError(
            f"needs {int(ends[0])} tokens up to the end of its first answer; raise data.max_length of {max_length}"
        )
    turns = conversation["conversations"][:2]
    images = conversation["image"][: str(turns[0]["value"]).count(IMAGE_MARKER)]
    return make_sample({**conversation, "image": images, "conversations": turns}, max_length=max_length)
