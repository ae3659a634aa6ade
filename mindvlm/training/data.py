"""Batches of rendered text for Vary-nano, made by background processes in a fixed order.

B batch, L length (the same for every batch of a job), H and W of the processor's pictures.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.datagen.rendered_text import Stage, sample
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.training.processes import ProcessPool


@dataclass(frozen=True)
class Batch:
    """Inputs of one step.

    Attributes:
        input_ids: (B, L) int32, prompt and answer, filled with end-of-text.
        labels: (B, L) int32, the answer and the mark that closes it; elsewhere -100.
        prompt_lengths: (B,) int32.
        pixels: (B, 3, H, W) float32 of each vision branch; one array where branches see the same picture.
        texts: what the pictures show.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prompt_lengths: np.ndarray
    pixels: tuple[np.ndarray, ...]
    texts: list[str]


class RenderedTextBatches:
    """Makes batch number n of a job from its seed and n alone.

    Args:
        processor_type, processor_config: of the model.
        queries: questions; the first one has the share `main_query_share`.
        batch_size, seed: of the job.
        max_answer_tokens: a text of more characters than this less one is an error.
    """

    def __init__(
        self,
        processor_type: Callable,
        processor_config: Any,
        *,
        queries: Sequence[str],
        main_query_share: float,
        batch_size: int,
        max_answer_tokens: int,
        seed: int,
    ):
        self.processor = processor_type(processor_config)
        self.prompts = [self.processor.prompt(query, num_images=1).input_ids for query in queries]
        self.main_query_share = main_query_share if len(queries) > 1 else 1.0
        self.batch_size = batch_size
        self.max_answer_tokens = max_answer_tokens
        self.seed = seed
        self.end_id, self.fill_id = self.processor.stop_ids
        self.length = max(map(len, self.prompts)) + max_answer_tokens

    def make(self, number: int, stage: Stage, split: str = "training") -> Batch:
        """Batch `number`; its pictures are the samples number * B to number * B + B - 1."""
        rng = np.random.Generator(np.random.PCG64([self.seed, number]))
        rendered = [
            sample(self.seed, number * self.batch_size + row, stage=stage, split=split)
            for row in range(self.batch_size)
        ]
        pixels = stack_branches([self.processor.pixels(one.image) for one in rendered])
        input_ids = np.full((self.batch_size, self.length), self.fill_id, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        prompt_lengths = np.zeros(self.batch_size, dtype=np.int32)
        for row, one in enumerate(rendered):
            prompt, answer = self.prompts[self.query_number(rng, split)], self.answer_ids(one.text)
            input_ids[row, : len(prompt) + len(answer)] = prompt + answer
            labels[row, len(prompt) : len(prompt) + len(answer)] = answer
            prompt_lengths[row] = len(prompt)
        return Batch(input_ids, labels, prompt_lengths, pixels, [one.text for one in rendered])

    def query_number(self, rng: np.random.Generator, split: str) -> int:
        if split == "evaluation" or rng.random() < self.main_query_share:
            return 0
        return int(rng.integers(1, len(self.prompts)))

    def answer_ids(self, text: str) -> list[int]:
        """One id a byte, whatever longer tokens the vocabulary has for its prompts, and the end mark."""
        ids = [self.processor.tokenizer.encode(character)[0] for character in text] + [self.end_id]
        if len(ids) > self.max_answer_tokens:
            raise UserError(
                f"rendered_text.max_answer_tokens is {self.max_answer_tokens}; a text needs {len(ids)}, raise it"
            )
        return ids


def stack_branches(pictures: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """The arrays of each branch over all pictures; branches that share theirs share the result.

    Args:
        pictures: what a processor's `pixels` gives of each.
    """
    stacked: dict[tuple[int, ...], np.ndarray] = {}
    branches = zip(*(vars(one).values() for one in pictures), strict=True)
    arrays = [branch for branch in branches if branch[0] is not None]
    return tuple(stacked.setdefault(tuple(map(id, branch)), np.stack(branch)) for branch in arrays)


class BackgroundBatches:
    """Batches first, first + 1, ... in order, rendered ahead of time by other processes.

    The stage of a batch is settled when it is ordered, some steps before it is used; `ordered_stages` belongs into a
    checkpoint, so that a resumed job sees the same pictures.

    Args:
        options: arguments of `RenderedTextBatches`.
        stages: of the curriculum.
        first: number of the first batch.
        ordered_stages: stage numbers of the first batches.
        shard, num_shards: of `num_shards` replicas this one, whose batch n is number n * num_shards + shard of all.
    """

    AHEAD = 4

    def __init__(
        self,
        options: dict,
        *,
        stages: Sequence[Stage],
        num_workers: int,
        first: int,
        ordered_stages: Sequence[int],
        shard: int = 0,
        num_shards: int = 1,
    ):
        self.stages, self.shard, self.num_shards = stages, shard, num_shards
        remedy = "lower rendered_text.num_workers"
        self.pool = ProcessPool(num_workers, _start_worker, (options,), remedy=remedy)
        self.next_number = first
        self.results: deque = deque()
        self.ordered_stages: deque[int] = deque()
        for stage in ordered_stages:
            self._order(stage)

    def take(self, stage: int) -> Batch:
        """The next batch; orders one of `stage` to come `AHEAD` steps later."""
        while len(self.results) <= self.AHEAD:
            self._order(stage)
        self.ordered_stages.popleft()
        return self.pool.result(self.results.popleft())

    def _order(self, stage: int) -> None:
        number = self.next_number * self.num_shards + self.shard
        self.results.append(self.pool.submit(_make, number, self.stages[stage]))
        self.ordered_stages.append(stage)
        self.next_number += 1

    def close(self) -> None:
        """Ends the processes."""
        self.pool.close()


_maker: RenderedTextBatches | None = None


def _start_worker(options: dict) -> None:
    global _maker
    _maker = RenderedTextBatches(**options)


def _make(number: int, stage: Stage) -> Batch:
    return _maker.make(number, stage)
