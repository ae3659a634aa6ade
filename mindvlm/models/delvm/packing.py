"""Packs of sentences as DeLVM trains on them, in the order of the original program.

A pack has a fixed number of codes. It consists of segments, which do not see each other.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.token_files import TokenFile
from mindvlm.processing.samples.label_rules import IGNORED_LABEL

MODES = ("pack", "one", "unpack")
SEED = 1024
MIN_LENGTH = 50


@dataclass(frozen=True)
class Pack:
    """The codes of one pack, L in all.

    Attributes:
        input_ids: (L,) int32.
        labels: (L,) int32, the code after each position; IGNORED_LABEL where it is no target.
        positions: (L,) int32, from 0 in each segment.
        cu_seqlens: (S + 1,) int32, where the S segments begin, and L.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray

    @property
    def segment_ids(self) -> np.ndarray:
        """The segment of each position, (L,) int32. A position sees those of its segment that are not after it."""
        lengths = np.diff(self.cu_seqlens)
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    def rows(self, num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns codes and labels (num_rows, length) int32 of the first segments; the tails are 0.

        The original program, too, gives the tails of labels the code 0 and not IGNORED_LABEL.
        """
        rows = np.zeros((2, num_rows, length), np.int32)
        for row, (start, end) in enumerate(zip(self.cu_seqlens[:num_rows], self.cu_seqlens[1:], strict=False)):
            rows[0, row, : end - start] = self.input_ids[start:end]
            rows[1, row, : end - start] = self.labels[start:end]
        return rows[0], rows[1]


class PackedTokens:
    """The packs of one file of codes; sentences are shuffled once, and codes that fill no pack are left out.

    Args:
        pack_length: codes of a pack.
        segment_length: the longest segment.
        mode: "pack": a sentence is cut at the end of a pack, continues in the next one as a new segment, and never
            shares a segment with another; "one": segments of `segment_length` follow each other without regard to
            sentences, but the last code of a sentence has no target; "unpack": a pack has as many sentences as
            segments fit, each cut to a segment.
        min_length: shorter sentences are left out.
        ignore_code_0: code 0 is no target, as in the original program.

    Attributes:
        kept: numbers of the lines that are long enough, (N,) int64.
        order: the shuffled order of `kept`, (N,) int64.

    Raises:
        UserError: the lengths do not fit each other.
    """

    def __init__(
        self,
        file: TokenFile,
        pack_length: int,
        segment_length: int,
        *,
        mode: str = "pack",
        min_length: int = MIN_LENGTH,
        ignore_code_0: bool = True,
        seed: int = SEED,
    ):
        if mode not in MODES:
            raise UserError(f"the mode of packing is {mode!r}; expected one of {', '.join(MODES)}")
        if segment_length < 1 or pack_length < 1 or pack_length % segment_length:
            raise UserError(f"a pack has {pack_length} codes; expected a multiple of a segment's {segment_length}")
        self.file, self.pack_length, self.segment_length = file, pack_length, segment_length
        self.mode, self.first_target = mode, int(ignore_code_0)
        self.kept = np.flatnonzero(file.lengths >= min_length)
        self.order = np.arange(len(self.kept))
        np.random.RandomState(seed).shuffle(self.order)
        self.lines = self.kept[self.order]
        self.ends = np.cumsum(file.lengths[self.lines])

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.pack_length if len(self.ends) else 0

    def __getitem__(self, number: int) -> Pack:
        """Returns a pack. Raises IndexError if there is none of this number, and UserError as `TokenFile` does."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self.mode == "unpack":
            return self._unpacked(number)
        pieces = list(self._pieces(number * self.pack_length))
        codes = np.concatenate([piece for piece, _ in pieces])
        targets = np.concatenate([np.append(piece[1:], following) for piece, following in pieces])
        if self.mode == "one":
            # here the original program has no target for the last code of a pack, even within a sentence
            targets[-1] = IGNORED_LABEL
            return self._pack(codes, targets, self._segments(self.pack_length))
        return self._pack(codes, targets, [length for piece, _ in pieces for length in self._segments(len(piece))])

    def _pieces(self, start: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the pieces of sentences of the pack at code `start`, each with the code after it, or IGNORED_LABEL."""
        stop = start + self.pack_length
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            codes = self.file[int(self.lines[place])]
            begin = len(codes) - (int(self.ends[place]) - start)
            end = min(len(codes), begin + stop - start)
            yield codes[begin:end], int(codes[end]) if end < len(codes) else IGNORED_LABEL
            start += end - begin
            place += 1

    def _segments(self, length: int) -> list[int]:
        whole, rest = divmod(length, self.segment_length)
        return [self.segment_length] * whole + [rest] * (rest > 0)

    def _unpacked(self, number: int) -> Pack:
        """Returns the pack of one sentence per segment; its unused tail is one more segment of code 0."""
        count = self.pack_length // self.segment_length
        lines = self.lines[number * count : (number + 1) * count]
        pieces = [self.file[int(line)][: self.segment_length] for line in lines]
        tail = self.pack_length - sum(map(len, pieces))
        codes = np.concatenate([*pieces, np.zeros(tail, np.int64)])
        targets = [np.append(piece[1:], IGNORED_LABEL) for piece in pieces]
        lengths = [*map(len, pieces), *[tail] * (tail > 0)]
        return self._pack(codes, np.concatenate([*targets, np.full(tail, IGNORED_LABEL)]), lengths)

    def _pack(self, codes: np.ndarray, targets: np.ndarray, lengths: Sequence[int]) -> Pack:
        return Pack(
            input_ids=np.abs(codes).astype(np.int32),
            labels=trained(targets, self.first_target),
            positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
            cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        )


def trained(targets: np.ndarray, first_target: int) -> np.ndarray:
    """Returns the labels int32 of targets: IGNORED_LABEL for those below `first_target`, such as negative ones."""
    return np.where(targets >= first_target, targets, IGNORED_LABEL).astype(np.int32)


def padded_rows(
    sentences: Sequence[np.ndarray], length: int, *, ignore_code_0: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes and labels (B, length) int32 of sentences in rows, as an evaluation reads them.

    A sentence is cut to `length`, and padded with code 0 and the label IGNORED_LABEL.
    """
    ids = np.zeros((len(sentences), length), np.int32)
    labels = np.full(ids.shape, IGNORED_LABEL, np.int32)
    for row, codes in enumerate(sentences):
        codes = codes[:length]
        ids[row, : len(codes)] = np.abs(codes)
        labels[row, : len(codes) - 1] = trained(codes[1:], int(ignore_code_0))
    return ids, labels


class PackOrder:
    """The batches of packs of one data-parallel rank, shuffled in each epoch.

    Args:
        num_packs: of all files.
        batch_size: packs of a rank in a batch.
        growth: (first, step, every): batches begin with `first` packs and grow by `step` after `every` batches.

    Raises:
        UserError: no batch can be filled.
    """

    def __init__(
        self,
        num_packs: int,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        growth: tuple[int, int, int] | None = None,
        seed: int = SEED,
    ):
        if num_packs < batch_size * num_ranks:
            raise UserError(
                f"the data fill {num_packs} packs, but a batch has {batch_size * num_ranks}; give more data, "
                "lower data.pack_length, or take fewer packs a step (rows_per_step, data.batch_size, parallel.dp)"
            )
        self.num_packs, self.batch_size, self.rank, self.num_ranks = num_packs, batch_size, rank, num_ranks
        self.first, self.step, self.every = growth or (batch_size, 0, 1)
        self.generator = np.random.RandomState(seed)
        self.num_batches = 0

    def epoch(self) -> Iterator[np.ndarray]:
        """Yields the numbers of the packs of each batch of the next epoch; those that fill no batch are left out."""
        order = np.arange(self.num_packs)
        self.generator.shuffle(order)
        own = order[: self.num_packs - self.num_packs % self.num_ranks][self.rank :: self.num_ranks]
        start = 0
        while start + (size := self.next_size()) <= len(own):
            yield own[start : start + size]
            start += size
            self.num_batches += 1

    def batches(self, first: int = 0) -> Iterator[np.ndarray]:
        """Yields the numbers of the packs of each batch from number `first` on, epoch after epoch, without end."""
        return itertools.islice(itertools.chain.from_iterable(self.epoch() for _ in itertools.count()), first, None)

    def next_size(self) -> int:
        return min(self.first + self.step * (self.num_batches // self.every), self.batch_size)
