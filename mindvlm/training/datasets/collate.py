"""Collates samples into one batch of static shape.

B rows, L tokens, N images, C channels, H and W of a branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.nn.splice import splice_sources
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.training.datasets.samples import Sample


@dataclass(frozen=True)
class SampleBatch:
    """Inputs of one forward pass.

    Attributes:
        input_ids: (B, L) int32, padded on the right; placeholders without an embedding have the pad id too.
        labels: (B, L) int32, not shifted; -100 where nothing is learned and in the padding.
        sources: (B, L) int32, rows of [token embeddings; image features], see `splice_sources`.
        pixels: (N, C, H, W) float32 of each branch; images in reading order, then zeros up to the number of slots.
        num_images: images without padding.
        num_tokens: tokens without padding.
        num_learned: labels that a loss shifted by one counts.
        numbers: sample numbers.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    pixels: dict[str, np.ndarray]
    num_images: int
    num_tokens: int
    num_learned: int
    numbers: list[int]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads samples on the right.

    Attributes:
        pad_id: id of the padding.
        placeholder_id: id of one feature row; an image has `image_token_len` of them.
        pixel_shapes: (C, H, W) of each branch.
        lengths: allowed values of L in rising order; empty for multiples of `pad_multiple`.
        image_slots: N is a positive multiple of this, so that few graphs are compiled; 0 does not pad images.
    """

    pad_id: int
    placeholder_id: int
    image_token_len: int
    pixel_shapes: dict[str, tuple[int, int, int]]
    lengths: tuple[int, ...] = ()
    pad_multiple: int = 64
    image_slots: int = 0

    def __call__(self, samples: Sequence[Sample]) -> SampleBatch:
        """Returns the batch of these rows. Raises UserError if a sample is longer than every allowed length."""
        length = self.padded_length(max(len(sample.input_ids) for sample in samples))
        input_ids = np.full((len(samples), length), self.pad_id, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = sample.input_ids
            labels[row, : len(sample.labels)] = sample.labels
        num_images = sum(sample.num_images for sample in samples)
        sources = splice_sources(input_ids, num_images, self.image_token_len, self.placeholder_id)
        return SampleBatch(
            input_ids=np.where(input_ids < 0, np.int32(self.pad_id), input_ids),
            labels=labels,
            sources=sources,
            pixels={name: self._stack(name, samples, num_images) for name in self.pixel_shapes},
            num_images=num_images,
            num_tokens=sum(len(sample.input_ids) for sample in samples),
            num_learned=int((labels[:, 1:] != IGNORED_LABEL).sum()),
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

    def _stack(self, name: str, samples: Sequence[Sample], num_images: int) -> np.ndarray:
        slots = num_images
        if self.image_slots:
            slots = max(1, -(-num_images // self.image_slots)) * self.image_slots
        pixels = np.zeros((slots, *self.pixel_shapes[name]), dtype=np.float32)
        row = 0
        for sample in samples:
            if sample.num_images:
                pixels[row : row + sample.num_images] = sample.pixels[name]
                row += sample.num_images
        return pixels
