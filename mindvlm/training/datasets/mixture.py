"""Maps sample number n to a record of a data set, as a function of the seed and n alone."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from mindvlm.core.errors import UserError

NUM_ROUNDS = 8
_MASK = (1 << 64) - 1


class Permutation:
    """A random order of 0..size-1, chosen by `key`, that takes no memory.

    An alternating Feistel network over two mixed-radix digits of nearly equal range (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). The few numbers out of range pass through it again.
    """

    def __init__(self, size: int, key: int):
        self.size = size
        self.high = int(size**0.5)
        self.high += self.high * self.high < size
        self.low = -(-size // self.high)
        self.round_keys = [derive_key("permutation", key, number) for number in range(NUM_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Returns the image of `position`. Raises IndexError outside of 0..size-1."""
        if not 0 <= position < self.size:
            raise IndexError(position)
        while True:
            position = self._mix(position)
            if position < self.size:
                return position

    def _mix(self, position: int) -> int:
        high, low = divmod(position, self.low)
        for number, key in enumerate(self.round_keys):
            if number % 2:
                low = (low + _scramble(high ^ key)) % self.low
            else:
                high = (high + _scramble(low ^ key)) % self.high
        return high * self.low + low


def derive_key(*parts: object) -> int:
    """Returns 64 bits that depend on the parts alone; `hash` also depends on the process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _scramble(value: int) -> int:
    """The output function of the SplitMix64 generator."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class SamplePlace(NamedTuple):
    """A record: the position of its data set in the mixture, its number there, and the epoch of the sample."""

    dataset: int
    record: int
    epoch: int


class Mixture:
    """The endless sequence of samples of weighted data sets; numbers 0 to `epoch_size` - 1 are the first epoch.

    An epoch draws round(weight * size) records of each data set and mixes them. A data set is drawn in passes, each a
    new permutation: no record repeats before all others have been drawn, also across epochs (weight 0.5 draws one half
    in the first epoch and the other half in the second).

    Args:
        names: of the data sets; the order depends on them and the seed, so another data set does not change it.
        sizes: number of records of each.
        weights: of each, above 0.
        shuffle: False keeps the order of the data sets and their records, for evaluation.

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
        """Number of samples of one epoch."""
        return self.ends[-1]

    def __getitem__(self, number: int) -> SamplePlace:
        """Returns the record of sample `number`, any number from 0."""
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
