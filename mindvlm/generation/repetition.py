"""Loops: the ids of an answer that repeat one sequence without end."""

from collections.abc import Sequence

import numpy as np

from mindvlm.core.config import NUM_REPETITIONS

MAX_PERIOD = 250
"""Length of the longest sequence whose repetitions are found; a quarter of the limit if that is longer."""

MAX_REPEATED_TOKENS_OF_PAGES = 700
"""`max_repeated_tokens` of pages: longer than tables of 10 x 10 equal cells in Markdown and LaTeX."""


class RepeatedTail:
    """Measures how far back the last ids repeat sequences of 1 to `MAX_PERIOD` ids.

    A step takes some microseconds, and memory does not grow.

    Args:
        limit: number of repeated ids that are a loop; see `GenerationConfig.max_repeated_tokens`.
    """

    def __init__(self, limit: int = 0):
        self.periods = np.arange(1, max(MAX_PERIOD, limit // NUM_REPETITIONS) + 1)
        # a long sequence must appear several times too
        self.limits = np.maximum(limit, NUM_REPETITIONS * self.periods)
        # entry p - 1 is the id p places back, and for how many ids that was the same id
        self.recent, self.num_equal = np.full((2, len(self.periods)), -1)

    def is_loop_with(self, token: int) -> bool:
        """Takes the next id; returns whether the last ids are a loop."""
        self.num_equal = np.where(self.recent == token, self.num_equal + 1, 0)
        self.recent[1:] = self.recent[:-1]
        self.recent[0] = token
        return bool((self.num_equal + self.periods >= self.limits).any())


def num_repeated_tokens(ids: Sequence[int]) -> int:
    """Returns how many of the last ids repeat one sequence at least four times; 0 if none do."""
    tail = RepeatedTail()
    for token in ids:
        tail.is_loop_with(token)
    lengths = tail.num_equal + tail.periods
    return int(lengths[lengths >= tail.limits].max(initial=0))
