"""Which record of which data set is sample number n: a function of the seed and n alone."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.permutation import Permutation, derive_key


class SamplePlace(NamedTuple):
    """A record: position of its data set in the mixture, its number there, and the epoch of the sample."""

    dataset: int
    record: int
    epoch: int


class Mixture:
    """The endless sequence of samples of weighted data sets, numbers 0 to `epoch_size` - 1 being the first epoch.

    An epoch draws round(weight * size) records of each data set, all mixed. A data set is drawn in passes, each a new
    permutation of it: no record comes twice before all others have come, also across epochs (weight 0.5 takes one half
    in the first epoch and the other in the second).

    Args:
        names: of the data sets; they and the seed choose the order, so adding a data set leaves that of others alone.
        sizes: records of each.
        weights: of each, above 0.
        shuffle: False goes through the data sets one after the other, for evaluation.

    Raises:
        UserError: a weight leaves no record of its data set.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool = True
    ):
        self.names, self.sizes, self.seed, self.shuffle = tuple(names), tuple(sizes), seed, shuffle
        self.counts = tuple(round(weight * size) for weight, size in zip(weights, sizes, strict=True))
        for name, size, weight, count in zip(names, sizes, weights, self.counts, strict=True):
            if count < 1:
                raise UserError(f"data set {name!r}: weight {weight} of {size} records leaves none; raise the weight")
        self.ends = tuple(accumulate(self.counts))
        self._permutation = lru_cache(maxsize=2 * len(self.names) + 2)(self._make_permutation)

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return self.ends[-1]

    def __getitem__(self, number: int) -> SamplePlace:
        """The place of sample `number`, any number from 0."""
        epoch, position = divmod(number, self.epoch_size)
        mixed = self._permutation("", epoch, self.epoch_size)[position] if self.shuffle else position
        dataset = bisect_right(self.ends, mixed)
        drawn = epoch * self.counts[dataset] + mixed - (self.ends[dataset] - self.counts[dataset])
        size = self.sizes[dataset]
        turn, record = divmod(drawn, size)
        if self.shuffle:
            record = self._permutation(self.names[dataset], turn, size)[record]
        return SamplePlace(dataset, record, epoch)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "_permutation"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._permutation = lru_cache(maxsize=2 * len(self.names) + 2)(self._make_permutation)

    def _make_permutation(self, name: str, turn: int, size: int) -> Permutation:
        return Permutation(size, derive_key(self.seed, name, turn))
