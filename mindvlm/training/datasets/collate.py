"""Collates samples into one batch of static shape.

B rows, L tokens, N views, C channels, H and W of a branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.nn.splice import ANSWERED, PROMPT
from mindvlm.processing.images.picture import NEWLINE, Picture, branches_of
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.training.datasets.samples import Sample


@dataclass(frozen=True)
class SampleBatch:
    """Inputs of one forward pass.

    Attributes:
        input_ids: (B, L) int32, padded on the right; placeholders without an embedding have the pad id too.
        labels: (B, L) int32, not shifted; -100 where nothing is learned and in the padding.
        sources: (B, L) int32, rows of [token embeddings; feature rows of all view slots; the row that a family adds].
        choices: (B, 1 + P, L) int32 for models that leave out placeholders by the text, else None. [:, 0] is `PROMPT`
            or `ANSWERED` for a token of text, and 0 elsewhere. [:, k] is 1 for a placeholder of the k-th picture that
            may be left out. P is the largest number of pictures of a sample, at least 1.
        pixels: (N, C, H, W) float32 of each branch, where C may be several axes; views in reading order, then zeros up
            to the number of slots. Branches of one kind of view have the same N.
        num_tokens: tokens without padding.
        numbers: sample numbers.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    choices: np.ndarray | None
    pixels: dict[str, np.ndarray]
    num_tokens: int
    numbers: list[int]


def padded_slots(num_views: int, multiple: int) -> int:
    """Returns the number of slots for views of one kind, see `Collator.image_slots`."""
    multiple = max(1, multiple)
    return max(1, -(-num_views // multiple)) * multiple


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads samples on the right.

    Attributes:
        pad_id: id of the padding.
        placeholder_id: id of one feature row.
        rows_per_view: feature rows of a view.
        kinds: the branches of each kind of view.
        pixel_shapes: (C, H, W) of each branch.
        has_choices: whether the batches have `choices`.
        lengths: allowed values of L in rising order; empty for multiples of `pad_multiple`.
        image_slots: of each kind of view; N is a positive multiple of it, so that few graphs are compiled; 0 counts as
            1.
    """

    pad_id: int
    placeholder_id: int
    rows_per_view: int
    kinds: tuple[tuple[str, ...], ...]
    pixel_shapes: dict[str, tuple[int, ...]]
    has_choices: bool = False
    lengths: tuple[int, ...] = ()
    pad_multiple: int = 64
    image_slots: tuple[int, ...]

    def __call__(self, samples: Sequence[Sample]) -> SampleBatch:
        """Returns the batch of these rows. Raises UserError if a sample is longer than every allowed length."""
        length = self.padded_length(max(len(sample.input_ids) for sample in samples))
        input_ids = np.full((len(samples), length), self.pad_id, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = sample.input_ids
            labels[row, : len(sample.labels)] = sample.labels
        pixels, rows = self._views([picture for sample in samples for picture in sample.pictures])
        sources = np.arange(input_ids.size, dtype=np.int32).reshape(input_ids.shape)
        sources[input_ids == self.placeholder_id] = input_ids.size + rows
        return SampleBatch(
            input_ids=np.where(input_ids < 0, np.int32(self.pad_id), input_ids),
            labels=labels,
            sources=sources,
            choices=self._choices(samples, length) if self.has_choices else None,
            pixels=pixels,
            num_tokens=sum(len(sample.input_ids) for sample in samples),
            numbers=[sample.number for sample in samples],
        )

    def padded_length(self, longest: int) -> int:
        """Returns L of a batch whose longest row has `longest` tokens."""
        if not self.lengths:
            return -(-longest // self.pad_multiple) * self.pad_multiple
        for length in self.lengths:
            if longest <= length:
                return length
        raise UserError(
            f"data.lengths ends with {self.lengths[-1]}; a sample has {longest} tokens, lower data.max_length"
        )

    def _views(self, pictures: Sequence[Picture]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns the pixels of each branch, and the feature row of every placeholder, counted from the first view."""
        views = [[branches_of(view) for view in picture.views] for picture in pictures]
        pixels: dict[str, np.ndarray] = {}
        first, slots_of = 0, {}
        for kind, multiple in zip(self.kinds, self.image_slots, strict=True):
            own = [view for picture in views for view in picture if tuple(view) == kind]
            num_slots = padded_slots(len(own), multiple)
            for branch in kind:
                pixels[branch] = np.zeros((num_slots, *self.pixel_shapes[branch]), dtype=np.float32)
                for slot, view in enumerate(own):
                    pixels[branch][slot] = view[branch]
            slots_of[kind] = iter(range(first, first + len(own)))
            first += num_slots
        num_rows = first * self.rows_per_view
        rows = [np.zeros(0, np.int32)]
        for picture, own in zip(pictures, views, strict=True):
            starts = np.array([next(slots_of[tuple(view)]) for view in own], np.int32) * self.rows_per_view
            of_views = starts[picture.layout // self.rows_per_view] + picture.layout % self.rows_per_view
            rows.append(np.where(picture.layout == NEWLINE, np.int32(num_rows), of_views))
        return pixels, np.concatenate(rows)

    def _choices(self, samples: Sequence[Sample], length: int) -> np.ndarray:
        num_pictures = max(1, *(len(sample.pictures) for sample in samples))
        choices = np.zeros((len(samples), 1 + num_pictures, length), np.int32)
        for own, sample in zip(choices, samples, strict=True):
            has_answered = np.cumsum(sample.labels != IGNORED_LABEL) > 0
            is_image = sample.input_ids == self.placeholder_id
            own[0, : len(is_image)] = np.where(is_image, 0, np.where(has_answered, ANSWERED, PROMPT))
            places, start = np.flatnonzero(is_image), 0
            for row, picture in zip(own[1:], sample.pictures, strict=False):
                end = start + len(picture.layout)
                row[places[start + picture.num_fixed : end]] = 1
                start = end
        return choices
