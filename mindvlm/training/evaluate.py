"""Evaluation during training: greedy answers to held-out samples with the current parameters."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.datagen.rendered_text import DIFFICULTIES
from mindvlm.generation.answer import AnswerText
from mindvlm.generation.engine import Engine
from mindvlm.generation.images import ImageEncoder
from mindvlm.generation.request import Request
from mindvlm.models.own_training import Evaluation, Reading
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.processing.text.edit_distance import character_error_rate, normalized_edit_distance
from mindvlm.training.config import EvaluationConfig
from mindvlm.training.datasets.config import DatasetsConfig, sample_options
from mindvlm.training.datasets.samples import Sample, SampleMaker, Skipped
from mindvlm.training.rendered_batches import Batch, RenderedTextData

logger = logging.getLogger(__name__)

RENDERED_TEXT_SEED = 20_000
MAX_SKIPPED_SHARE = 0.5


class Reader:
    """Reads batches greedily through the inference graphs.

    Args:
        model: of the training step; it is back in training mode after each reading.
        processor: gives tokenizer and stop marks.
        max_length: the most tokens of prompt and answer.
        num_slots: the prompts that are answered at the same time.
        graph_mode: whether Cells are compiled.
    """

    def __init__(self, model: ImageTextModel, processor: Any, *, max_length: int, num_slots: int, graph_mode: bool):
        self.model = model
        self.processor = processor
        placeholder_id = processor.tokenizer.special_id(processor.image_span.placeholder)
        self.engine = Engine(
            model, placeholder_id=placeholder_id, max_length=max_length, num_slots=num_slots, graph_mode=graph_mode
        )
        model.set_train(True)

    def read(self, prompts: Iterable[tuple[list[int], Tensor | None]], *, max_new_tokens: int) -> list[str]:
        """Returns the model's answers.

        Args:
            prompts: ids and feature rows of each prompt. An iterator computes the rows while the model does not train.
            max_new_tokens: the longest answer.
        """
        stops: list[AnswerText] = []
        options = GenerationConfig(max_new_tokens=max_new_tokens)
        self.model.set_train(False)
        try:
            requests = []
            for ids, rows in prompts:
                decoder = self.processor.tokenizer.text_decoder()
                stops.append(AnswerText(self.processor.stop_ids, self.processor.stop_strings, decoder))
                requests.append(Request(ids=ids, features=rows, options=options, stop=stops[-1].reason_after))
            slots = self.engine.complete(requests)
        finally:
            self.model.set_train(True)
        for stop in stops:
            stop.end()
        errors = [slot.error for slot in slots if slot.error]
        if errors:
            logger.info(f"evaluation: {len(errors)} of {len(slots)} answers are not complete, {errors[0]}")
        return [stop.answer for stop in stops]


class RenderedTextEvaluator:
    """Evaluates images of unseen words, of all kinds and of the current stage of the curriculum.

    Args:
        source: the source of the job.
        model: the model of the training step.
        graph_mode: whether Cells are compiled.
    """

    def __init__(self, source: RenderedTextData, model: ImageTextModel, *, graph_mode: bool):
        self.source = source
        self.batches = source.batches
        self.reader = Reader(
            model,
            self.batches.processor,
            max_length=self.batches.length,
            num_slots=self.batches.config.batch_size,
            graph_mode=graph_mode,
        )

    def evaluate(self) -> Evaluation:
        stage = self.source.curriculum.stage
        full = self.read_stage(len(DIFFICULTIES) - 1)
        if stage == len(DIFFICULTIES) - 1:
            return full
        return replace(full, figures={**full.figures, "cer_stage": self.read_stage(stage).figures["cer"]})

    def read_stage(self, stage: int) -> Evaluation:
        """Evaluates the images of one stage."""
        batches = self.batches
        count = -(-self.source.config.num_evaluation_images // batches.config.batch_size)
        readings = []
        for number in range(RENDERED_TEXT_SEED, RENDERED_TEXT_SEED + count):
            batch = batches.make(number, DIFFICULTIES[stage], "evaluation")
            lengths = zip(batch.input_ids, batch.prompt_lengths, strict=True)
            prompts = [ids[:length].tolist() for ids, length in lengths]
            texts = self.reader.read(self.encoded(prompts, batch), max_new_tokens=batches.config.max_answer_tokens)
            readings += [Reading(f"batch {number}", *pair) for pair in zip(batch.texts, texts, strict=True)]
        return measured(readings)

    def encoded(self, prompts: list[list[int]], batch: Batch) -> Iterator[tuple[list[int], Tensor]]:
        """Returns each prompt with the features of its image."""
        yield from zip(prompts, self.reader.engine.encode_images(*batch.pixels), strict=True)


class DatasetsEvaluator:
    """The first answers of held-out records.

    Args:
        config: what is read.
        data: of the job, for the length of samples.
        processor_type, processor_config: of the model.
        model: of the training step.
        max_length: the most tokens of prompt and answer.
        graph_mode: whether Cells are compiled.

    Raises:
        UserError: see `sample_options`.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        data: DatasetsConfig,
        processor_type: Callable,
        processor_config: Any,
        model: ImageTextModel,
        *,
        max_length: int,
        graph_mode: bool,
    ):
        self.config = config
        held_out = replace(data, registry=config.registry, datasets=config.datasets, weights={}, augment=None)
        options = sample_options(held_out, partial(processor_type, processor_config), seed=0, shuffle=False)
        self.maker = SampleMaker(options)
        self.num_samples = min(config.num_samples, options.mixture.epoch_size)
        self.reader = Reader(
            model, self.maker.processor, max_length=max_length, num_slots=config.batch_size, graph_mode=graph_mode
        )
        self.room = max_length

    def evaluate(self) -> Evaluation:
        """Raises UserError if most samples cannot be used."""
        readings, skipped = [], []
        for first in range(0, self.num_samples, self.config.batch_size):
            made = [self.make(n) for n in range(first, min(first + self.config.batch_size, self.num_samples))]
            samples = [sample for sample in made if isinstance(sample, Sample)]
            skipped += [sample for sample in made if not isinstance(sample, Sample)]
            if samples:
                readings += self.read(samples)
        if len(skipped) > MAX_SKIPPED_SHARE * self.num_samples:
            raise UserError(f"evaluation: {len(skipped)} of {self.num_samples} samples cannot be used, {skipped[0]}")
        if skipped:
            logger.info(f"evaluation: {len(skipped)} of {self.num_samples} samples cannot be used, {skipped[0]}")
        return measured(readings)

    def make(self, number: int) -> Sample | Skipped:
        """Makes a sample; one whose answer no original rule finds cannot be used."""
        made = self.maker.make(number)
        if isinstance(made, Skipped) or (made.labels != IGNORED_LABEL).any():
            return made
        place = self.maker.options.mixture[number]
        line = self.maker.indexes[place.dataset].place(place.record).line
        return Skipped(number, made.dataset, made.record, line, "has no label; choose the template of the tokenizer")

    def read(self, samples: list[Sample]) -> list[Reading]:
        """Answers of at most one batch."""
        room = self.room - max(len(self.prompt(sample)) for sample in samples)
        # a new encoder, because the weights have changed
        encoder = ImageEncoder(self.reader.engine)
        prompts = (self.encoded(sample, encoder) for sample in samples)
        texts = self.reader.read(prompts, max_new_tokens=max(1, min(self.config.max_new_tokens, room)))
        return [
            Reading(f"{sample.dataset} {sample.record}", self.reference(sample), text)
            for sample, text in zip(samples, texts, strict=True)
        ]

    def prompt(self, sample: Sample) -> list[int]:
        """Returns the ids before the first token with a label."""
        return sample.input_ids[: int(np.argmax(sample.labels != IGNORED_LABEL))].tolist()

    def encoded(self, sample: Sample, encoder: ImageEncoder) -> tuple[list[int], Tensor | None]:
        """Returns the ids and the feature rows of a prompt. Pictures may have fewer rows than in training."""
        ids, placeholder_id = np.array(self.prompt(sample)), self.reader.engine.placeholder_id
        lengths = [len(picture.layout) for picture in sample.pictures]
        pictures = sample.pictures[: self.maker.count_images(ids, lengths=lengths)]
        features = encoder.encode(pictures, ids[ids != placeholder_id].tolist())
        starts = np.flatnonzero(ids == placeholder_id)[np.cumsum([0, *lengths])[: len(pictures)]]
        repeats = np.where(ids == placeholder_id, 0, 1)
        repeats[starts] = features.counts
        return np.repeat(ids, repeats).tolist(), features.rows

    def reference(self, sample: Sample) -> str:
        return str(self.maker.conversation(sample.number)["conversations"][1]["value"]).strip()


def measured(readings: list[Reading]) -> Evaluation:
    """Computes the character error rate and the normalized edit distance of answers."""
    texts, references = [one.text for one in readings], [one.reference for one in readings]
    figures = {
        "cer": character_error_rate(texts, references),
        "edit_distance": normalized_edit_distance(texts, references),
    }
    return Evaluation(figures, readings)
