"""Orders an epoch so that the rows of a step have similar lengths, and all or none of them have images.

As in LLaVA, a random order is cut into megabatches (the rows of a pass on all devices). Each is sorted by length and
dealt to the devices so that their total lengths are similar. The original fails if all samples of an epoch have images
or none have; here such an epoch is ordered by length alone.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.processing.samples.record_formats import RecordFormat
from mindvlm.training.datasets.annotation_index import AnnotationIndex
from mindvlm.training.datasets.mixture import Mixture, SamplePlace, derive_key

Permute = Callable[[int], Sequence[int]]
"""Returns a random order of 0..n-1; called once for each choice, in a fixed order."""


def group_by_length(lengths: Sequence[int], *, batch_size: int, num_shards: int, permute: Permute) -> list[int]:
    """Returns the positions of the samples in their new order: by megabatch, then by device.

    Args:
        lengths: of every sample.
        batch_size: rows of a device in one pass.
        num_shards: devices.
    """
    order = permute(len(lengths))
    grouped = []
    for megabatch in _cut(order, batch_size * num_shards):
        # stable, as in the original
        longest_first = sorted(megabatch, key=lambda sample: lengths[sample], reverse=True)
        for shard in deal_evenly(longest_first, lengths, num_shards):
            grouped += shard
    return grouped


def group_by_modality(lengths: Sequence[int], *, batch_size: int, num_shards: int, permute: Permute) -> list[int]:
    """Groups samples with and without images as `group_by_length` does, then mixes the megabatches of both kinds.

    Samples that do not fill a megabatch of their kind are joined: a full megabatch comes first, the rest last.

    Args:
        lengths: of every sample, negative for samples without images.

    Raises:
        UserError: a length is 0.
    """
    if not all(lengths):
        raise UserError(f"sample {list(lengths).index(0)} has the length 0; it cannot be grouped; remove it")
    kinds = [[i for i, length in enumerate(lengths) if (length > 0) == has_image] for has_image in (True, False)]
    megabatches: list[list[int]] = []
    rest: list[int] = []
    size = batch_size * num_shards
    if not all(kinds):
        sizes = [abs(length) for length in lengths]
        return group_by_length(sizes, batch_size=batch_size, num_shards=num_shards, permute=permute)
    for kind in kinds:
        sizes = [abs(lengths[i]) for i in kind]
        order = group_by_length(sizes, batch_size=batch_size, num_shards=num_shards, permute=permute)
        *full, last = _cut([kind[i] for i in order], size)
        megabatches += full
        rest += last
    mixed = [megabatches[i] for i in permute(len(megabatches))]
    if len(rest) >= size:
        mixed, rest = [rest[:size], *mixed], rest[size:]
    return [i for megabatch in [*mixed, rest] for i in megabatch]


def deal_evenly(samples: Sequence[int], lengths: Sequence[int], num_shards: int) -> list[list[int]]:
    """Deals each sample to the device with the smallest total that is not full; in turns if they do not divide."""
    if len(samples) % num_shards:
        return [list(samples[shard::num_shards]) for shard in range(num_shards)]
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    sums: list[float] = [0] * num_shards
    for sample in samples:
        shard = sums.index(min(sums))
        shards[shard].append(sample)
        sums[shard] += lengths[sample]
        if len(shards[shard]) == len(samples) // num_shards:
            sums[shard] = float("inf")
    return shards


class GroupedMixture(Mixture):
    """A mixture whose epochs are in the order of `group_by_modality`; arguments as of `Mixture`.

    Args:
        lengths: of the records of each data set, see `record_lengths`.
        batch_size, num_shards: of the loader; the order depends on them.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        lengths: Sequence[np.ndarray],
        batch_size: int,
        num_shards: int,
    ):
        super().__init__(names, sizes, weights, seed=seed)
        self.lengths, self.batch_size, self.num_shards = list(lengths), batch_size, num_shards
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __getitem__(self, number: int) -> SamplePlace:
        epoch, position = divmod(number, self.epoch_size)
        return super().__getitem__(epoch * self.epoch_size + int(self._order(epoch)[position]))

    def __getstate__(self) -> dict:
        return {key: value for key, value in super().__getstate__().items() if key != "_order"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        places = [super(GroupedMixture, self).__getitem__(epoch * self.epoch_size + i) for i in range(self.epoch_size)]
        lengths = [int(self.lengths[place.dataset][place.record]) for place in places]
        rng = np.random.Generator(np.random.PCG64(derive_key(self.seed, "groups", epoch)))
        options = {"batch_size": self.batch_size, "num_shards": self.num_shards}
        return np.array(group_by_modality(lengths, permute=rng.permutation, **options), dtype=np.int64)


def record_lengths(index: AnnotationIndex, format: RecordFormat) -> np.ndarray:
    """Returns the words of every record of an annotation file (int32), negative for records without an image.

    An unreadable record counts as one word; the loader skips it later.
    """
    lengths = np.zeros(len(index), dtype=np.int32)
    for number in range(len(index)):
        try:
            record = index.read(number)
        except UserError:
            record = None
        lengths[number] = modality_length(record, format)
    return lengths


def modality_length(record: object, format: RecordFormat) -> int:
    """Returns the words of all messages of a record (at least 1), negative if it has no image."""
    try:
        parts = format.read(record)
    except UserError:
        return -1
    num_words = max(1, sum(len(str(turn.text).split()) for turn in parts.turns))
    return num_words if parts.images else -num_words


def _cut(order: Iterable[int], size: int) -> list[list[int]]:
    order = [int(i) for i in order]
    return [order[start : start + size] for start in range(0, len(order), size)]
