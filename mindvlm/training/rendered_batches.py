"""Batches of rendered text for Vary-nano, made by background processes in a fixed order.

B batch, L length (the same for every batch of a job), H and W of the processor's pictures.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.core.processes import ProcessPool
from mindvlm.datagen.rendered_text import DIFFICULTIES, TRAINING_DIFFICULTIES, Curriculum, Difficulty, sample
from mindvlm.models.own_training import PassInputs, text_inputs
from mindvlm.nn.splice import splice_sources
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.training.config import RenderedTextConfig
from mindvlm.training.datasets.loader import Share


@dataclass(frozen=True)
class Batch:
    """Inputs of one step.

    Attributes:
        input_ids: (B, L) int32, prompt and answer, padded with end-of-text.
        labels: (B, L) int32, the answer and its closing mark; -100 elsewhere.
        prompt_lengths: (B,) int32.
        pixels: (B, 3, H, W) float32 of each vision branch; one array if branches see the same image.
        texts: the texts in the images.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prompt_lengths: np.ndarray
    pixels: tuple[np.ndarray, ...]
    texts: list[str]


class RenderedTextBatches:
    """Makes batch n of a job as a function of the seed and n.

    Args:
        config: the section `rendered_text` of the job.
        processor_type, processor_config: processor of the model.
        seed: seed of the images.
    """

    def __init__(self, config: RenderedTextConfig, processor_type: Callable, processor_config: Any, seed: int):
        self.config, self.seed = config, seed
        self.processor = processor_type(processor_config)
        self.prompts = [self.processor.prompt(query, num_images=1).input_ids for query in config.queries]
        if len(self.processor.stop_ids) != 2:
            template = self.processor.template
            raise UserError(
                f"rendered_text: template {template.name!r} closes an answer with {template.answer_separator!r}, which "
                "is no token besides the end of text; set model_changes.processor.template to another one"
            )
        self.end_id, self.fill_id = self.processor.stop_ids
        self.length = max(map(len, self.prompts)) + config.max_answer_tokens

    def make(self, number: int, difficulty: Difficulty, split: str = "training") -> Batch:
        """Makes batch `number`, with the samples number * B to number * B + B - 1."""
        rng = np.random.Generator(np.random.PCG64([self.seed, number]))
        first, size = number * self.config.batch_size, self.config.batch_size
        rendered = [sample(self.seed, first + row, difficulty=difficulty, split=split) for row in range(size)]
        pixels = stack_branches([self.processor.pixels(one.image) for one in rendered])
        input_ids = np.full((size, self.length), self.fill_id, dtype=np.int32)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        prompt_lengths = np.zeros(size, dtype=np.int32)
        for row, one in enumerate(rendered):
            prompt, answer = self.prompts[self.query_number(rng, split)], self.answer_ids(one.text)
            input_ids[row, : len(prompt) + len(answer)] = prompt + answer
            labels[row, len(prompt) : len(prompt) + len(answer)] = answer
            prompt_lengths[row] = len(prompt)
        return Batch(input_ids, labels, prompt_lengths, pixels, [one.text for one in rendered])

    def query_number(self, rng: np.random.Generator, split: str) -> int:
        if split == "evaluation" or rng.random() < self.config.main_query_share or len(self.prompts) == 1:
            return 0
        return int(rng.integers(1, len(self.prompts)))

    def answer_ids(self, text: str) -> list[int]:
        """Returns one id per byte, although the vocabulary has longer tokens for prompts, and the end mark."""
        ids = [self.processor.tokenizer.encode(character)[0] for character in text] + [self.end_id]
        most = self.config.max_answer_tokens
        if len(ids) > most:
            raise UserError(f"rendered_text.max_answer_tokens is {most}; a text needs {len(ids)}, raise it")
        return ids


def stack_branches(pictures: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """Stacks the arrays of each branch over all images; branches that share an array share the result.

    Args:
        pictures: the result of the processor's `pixels` for each image.
    """
    stacked: dict[tuple[int, ...], np.ndarray] = {}
    branches = zip(*(vars(one).values() for one in pictures), strict=True)
    arrays = [branch for branch in branches if branch[0] is not None]
    return tuple(stacked.setdefault(tuple(map(id, branch)), np.stack(branch)) for branch in arrays)


class BackgroundBatches:
    """Batches first, first + 1, ... in order, rendered ahead of time by worker processes.

    The stage of a batch is fixed when the batch is ordered, some steps before its use. Checkpoints store
    `ordered_stages`, so that a resumed job sees the same images.

    Args:
        arguments: those of `RenderedTextBatches`; they can be pickled.
        num_workers: number of processes.
        difficulties: difficulties of the curriculum, by stage.
        first: number of the first batch.
        ordered_stages: stage numbers of the first batches.
        shard, num_shards: this replica and the number of replicas; its batch n is number n * num_shards + shard of all.
    """

    AHEAD = 4

    def __init__(
        self,
        arguments: tuple,
        *,
        difficulties: Sequence[Difficulty],
        num_workers: int,
        first: int,
        ordered_stages: Sequence[int],
        shard: int = 0,
        num_shards: int = 1,
    ):
        self.difficulties, self.shard, self.num_shards = difficulties, shard, num_shards
        remedy = "lower rendered_text.num_workers"
        self.pool = ProcessPool(num_workers, _start_worker, arguments, remedy=remedy)
        self.next_number = first
        self.results: deque = deque()
        self.ordered_stages: deque[int] = deque()
        for stage in ordered_stages:
            self._order(stage)

    def take(self, stage: int) -> Batch:
        """Returns the next batch, and orders a batch of `stage` for `AHEAD` steps later."""
        while len(self.results) <= self.AHEAD:
            self._order(stage)
        self.ordered_stages.popleft()
        return self.pool.result(self.results.popleft())

    def _order(self, stage: int) -> None:
        number = self.next_number * self.num_shards + self.shard
        self.results.append(self.pool.submit(_make, number, self.difficulties[stage]))
        self.ordered_stages.append(stage)
        self.next_number += 1

    def close(self) -> None:
        """Stops the worker processes."""
        self.pool.close()


_maker: RenderedTextBatches | None = None


def _start_worker(*arguments: Any) -> None:
    global _maker
    _maker = RenderedTextBatches(*arguments)


def _make(number: int, difficulty: Difficulty) -> Batch:
    return _maker.make(number, difficulty)


class RenderedTextData:
    """Images of rendered text, from easy ones to all.

    Args:
        config: the section `rendered_text` of the job.
        processor_type, processor_config: processor of the model; both can be pickled.
        seed: seed of the images.
        share: share of this process.
    """

    rows_per_epoch = None
    num_skipped = 0
    identity: dict[str, Any] = {}

    def __init__(
        self, config: RenderedTextConfig, processor_type: Callable, processor_config: Any, *, seed: int, share: Share
    ):
        self.config, self.share = config, share
        self.arguments = (config, processor_type, processor_config, seed)
        self.batches = RenderedTextBatches(*self.arguments)
        self.curriculum = Curriculum(threshold=config.curriculum_threshold)
        self.background: BackgroundBatches | None = None

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        ordered = []
        if state:
            if len(state["ordered_stages"]) % self.share.num_passes:
                raise UserError("the curriculum cannot resume with another number of passes per step; set accumulation")
            self.curriculum = replace(Curriculum(**state["curriculum"]), threshold=self.config.curriculum_threshold)
            ordered = state["ordered_stages"]
        self.background = BackgroundBatches(
            self.arguments,
            difficulties=TRAINING_DIFFICULTIES,
            num_workers=self.config.num_workers,
            first=step * self.share.num_passes,
            ordered_stages=ordered,
            shard=self.share.shard,
            num_shards=self.share.num_shards,
        )

    def take(self) -> list[PassInputs]:
        taken = [self.background.take(self.curriculum.stage) for _ in range(self.share.num_passes)]
        return [self.inputs(batch) for batch in taken]

    def inputs(self, batch: Batch) -> PassInputs:
        """Converts one batch to the inputs of a model."""
        span = self.batches.processor.image_span
        placeholder_id = self.batches.processor.tokenizer.special_id(span.placeholder)
        answers = int((batch.labels != -100).sum())
        return text_inputs(
            batch.input_ids,
            batch.labels,
            splice_sources(batch.input_ids, len(batch.input_ids), span.num_tokens, placeholder_id),
            batch.pixels,
            int(batch.prompt_lengths.sum()) + answers,
            [f"text {text!r}" for text in batch.texts],
        )

    def observe(self, loss: float) -> str | None:
        if self.curriculum.update(loss):
            return f"stage {self.curriculum.stage} of {len(DIFFICULTIES) - 1} begins"
        return None

    @property
    def figures(self) -> dict[str, float]:
        return {"stage": self.curriculum.stage}

    @property
    def state(self) -> dict[str, Any]:
        return {"curriculum": asdict(self.curriculum), "ordered_stages": list(self.background.ordered_stages)}

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return states[0]

    def close(self) -> None:
        if self.background:
            self.background.close()
