"""The new tokens of prompts, cut into runs of the prefill graph.

b sequences of a run, L length, B cache rows, R rotated dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.generation.graphs import BLOCK, bucket_length

MAX_PREFILL_LENGTH = 1024
"""Tokens of a run, which limits the memory of activations."""

RUN_SIZES = tuple(range(MAX_PREFILL_LENGTH // BLOCK, 0, -1))
"""Numbers of blocks that a run may have, the largest first; each has a graph."""


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The tokens of a prompt that are not in the cache yet.

    Attributes:
        row: row of the cache.
        start: position of the first one.
        ids: at least one.
        inv_freq: rotary frequencies of the row, (R/2,) float32.
    """

    row: int
    start: int
    ids: Sequence[int]
    inv_freq: np.ndarray


@dataclass(frozen=True, eq=False)
class PrefillRun:
    """The inputs of a run; see `PrefillGraph`.

    Attributes:
        ids, positions: (b, L) int32; ids are padded with 0, and positions with those that follow, or with -1 for the
            kernels, which then do not compute the padding.
        inv_freq: (b, R/2) float32.
        rows: (b,) int32, row of the cache of each sequence.
        ends: index of the last token of each prompt that ends in this run, by its row of the cache.
    """

    ids: np.ndarray
    positions: np.ndarray
    inv_freq: np.ndarray
    rows: np.ndarray
    ends: dict[int, int]


def packed_runs(prompts: Sequence[NewTokens], sizes: Sequence[int] = RUN_SIZES) -> Iterator[PrefillRun]:
    """Yields runs with blocks of several prompts, in order.

    Args:
        sizes: numbers of blocks that a run may have, the largest first and 1 last.
    """
    blocks = [(prompt, at) for prompt in prompts for at in range(0, len(prompt.ids), BLOCK)]
    while blocks:
        size = next(size for size in sizes if size <= len(blocks))
        yield run_of(blocks[:size], BLOCK, marks_padding=True)
        blocks = blocks[size:]


def separate_runs(prompts: Sequence[NewTokens], max_length: int) -> Iterator[PrefillRun]:
    """Yields runs with one sequence each; long prompts take several.

    Args:
        max_length: limit of the context, which the padding exceeds up to a multiple of `BLOCK` only.
    """
    for prompt in prompts:
        for at in range(0, len(prompt.ids), MAX_PREFILL_LENGTH):
            length = min(MAX_PREFILL_LENGTH, len(prompt.ids) - at)
            room = bucket_length(max_length) - prompt.start - at
            yield run_of([(prompt, at)], max(length, min(bucket_length(length), room)))


def run_of(sequences: Sequence[tuple[NewTokens, int]], length: int, *, marks_padding: bool = False) -> PrefillRun:
    """Returns the run of sequences of `length` tokens that begin at an index of their prompts.

    Args:
        marks_padding: whether padding has the position -1.
    """
    starts = np.array([prompt.start + at for prompt, at in sequences], np.int32)
    positions = starts[:, None] + np.arange(length, dtype=np.int32)
    ids, ends = np.zeros((len(sequences), length), np.int32), {}
    for number, (prompt, at) in enumerate(sequences):
        piece = prompt.ids[at : at + length]
        ids[number, : len(piece)] = piece
        if marks_padding:
            positions[number, len(piece) :] = -1
        if at + length >= len(prompt.ids):
            ends[prompt.row] = number * length + len(piece) - 1
    return PrefillRun(
        ids=ids,
        positions=positions,
        inv_freq=np.stack([prompt.inv_freq for prompt, _ in sequences]),
        rows=np.array([prompt.row for prompt, _ in sequences], np.int32),
        ends=ends,
    )
