"""How well a model in training reads what it has not seen: greedy answers with its live parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.datagen.curriculum import STAGES
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Generator
from mindvlm.generation.stopping import RowStop
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.processing.samples.chat_samples import IGNORED_LABEL
from mindvlm.processing.text.stream_decoder import StreamDecoder
from mindvlm.training.config import EvaluationConfig
from mindvlm.training.datasets.config import DatasetsConfig, sample_options
from mindvlm.training.datasets.samples import Sample, SampleMaker
from mindvlm.training.metrics import character_error_rate, normalized_edit_distance
from mindvlm.training.sources import RenderedTextSource

RENDERED_TEXT_SEED = 20_000
MAX_SKIPPED_SHARE = 0.5


@dataclass(frozen=True)
class Reading:
    """One answer: where the question comes from, what was expected and what the model wrote."""

    origin: str
    reference: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """Figures by name, less is better, and the answers that they are of."""

    figures: dict[str, float]
    readings: list[Reading] = field(default_factory=list)


class Evaluator(Protocol):
    """Reads the held-out samples of a job."""

    def evaluate(self) -> Evaluation: ...


class Reader:
    """Reads batches greedily through the inference graphs.

    Args:
        model: of the training step; it is back in training mode after each reading.
        processor: gives tokenizer and stop marks.
        max_length: the most tokens of prompt and answer.
        graph_mode: whether Cells are compiled.
    """

    def __init__(self, model: ImageTextModel, processor: Any, *, max_length: int, graph_mode: bool):
        self.model = model
        self.processor = processor
        placeholder_id = processor.tokenizer.special_id(processor.image_span.placeholder)
        self.engine = Engine(model, placeholder_id=placeholder_id, max_length=max_length, graph_mode=graph_mode)
        self.generator = Generator(self.engine)
        model.set_train(True)

    def read(self, prompts: list[list[int]], pixels: tuple[np.ndarray, ...], *, max_new_tokens: int) -> list[str]:
        """The model's answers.

        Args:
            prompts: ids of each row.
            pixels: of each vision branch, (N, C, H, W) float32, in the order of the placeholders; empty for none.
        """
        stop_ids, stop_strings = self.processor.stop_ids, self.processor.stop_strings
        stops = [RowStop(stop_ids, stop_strings, StreamDecoder(self.processor.tokenizer)) for _ in prompts]
        self.model.set_train(False)
        try:
            features = self.engine.encode_images(*pixels) if pixels and len(pixels[0]) else None
            self.engine.reset(len(prompts))
            logits = self.engine.append(prompts, features)
            rules = GenerationConfig(max_new_tokens=max_new_tokens)
            for _ in self.generator.stream(prompts, logits, rules, stops=stops, seed=0):
                pass
        finally:
            self.model.set_train(True)
        for stop in stops:
            stop.end()
        return [stop.answer for stop in stops]


class RenderedTextEvaluator:
    """Unseen words, over everything that Vary-nano is meant to read and over the present stage.

    Args:
        source: of the job.
        model: of the training step.
        graph_mode: whether Cells are compiled.
    """

    def __init__(self, source: RenderedTextSource, model: ImageTextModel, *, graph_mode: bool):
        self.source = source
        self.batches = source.batches
        self.reader = Reader(model, self.batches.processor, max_length=self.batches.length, graph_mode=graph_mode)

    def evaluate(self) -> Evaluation:
        stage = self.source.curriculum.stage
        full = self.read_stage(len(STAGES) - 1)
        if stage == len(STAGES) - 1:
            return full
        return replace(full, figures={**full.figures, "cer_stage": self.read_stage(stage).figures["cer"]})

    def read_stage(self, stage: int) -> Evaluation:
        """Reads the pictures of one stage."""
        batches = self.batches
        count = -(-self.source.config.num_evaluation_images // batches.batch_size)
        readings = []
        for number in range(RENDERED_TEXT_SEED, RENDERED_TEXT_SEED + count):
            batch = batches.make(number, STAGES[stage], "evaluation")
            lengths = zip(batch.input_ids, batch.prompt_lengths, strict=True)
            prompts = [ids[:length].tolist() for ids, length in lengths]
            texts = self.reader.read(prompts, batch.pixels, max_new_tokens=batches.max_answer_tokens)
            readings += [Reading(f"batch {number}", *pair) for pair in zip(batch.texts, texts, strict=True)]
        return measured(readings)


class DatasetsEvaluator:
    """The first answers of held-out records.

    Args:
        config: what is read.
        data: of the job, for the length of samples.
        processor_type, processor_config: of the model.
        model: of the training step.
        max_length: the most tokens of prompt and answer.
        graph_mode: whether Cells are compiled.
        say: takes lines of progress.

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
        say: Callable[[str], None],
    ):
        self.config = config
        self.say = say
        held_out = replace(data, registry=config.registry, datasets=config.datasets, weights={}, augment=None)
        options = sample_options(held_out, partial(processor_type, processor_config), seed=0, shuffle=False, say=say)
        self.maker = SampleMaker(options)
        self.num_samples = min(config.num_samples, options.mixture.epoch_size)
        self.reader = Reader(model, self.maker.processor, max_length=max_length, graph_mode=graph_mode)
        self.room = max_length

    def evaluate(self) -> Evaluation:
        """Raises UserError if most samples cannot be used."""
        readings, skipped = [], []
        for first in range(0, self.num_samples, self.config.batch_size):
            made = [self.maker.make(n) for n in range(first, min(first + self.config.batch_size, self.num_samples))]
            samples = [sample for sample in made if isinstance(sample, Sample)]
            skipped += [sample for sample in made if not isinstance(sample, Sample)]
            if samples:
                readings += self.read(samples)
        if len(skipped) > MAX_SKIPPED_SHARE * self.num_samples:
            raise UserError(f"evaluation: {len(skipped)} of {self.num_samples} samples cannot be used, {skipped[0]}")
        if skipped:
            self.say(f"evaluation: {len(skipped)} of {self.num_samples} samples cannot be used, {skipped[0]}")
        return measured(readings)

    def read(self, samples: list[Sample]) -> list[Reading]:
        """Answers of at most one batch, filled up by its last sample so that no other shape is compiled."""
        filled = samples + [samples[-1]] * (self.config.batch_size - len(samples))
        prompts = [self.prompt(sample) for sample in filled]
        counts = [self.maker.count_images(prompt) for prompt in prompts]
        with_images = [(sample, count) for sample, count in zip(filled, counts, strict=True) if count]
        branches = with_images[0][0].pixels if with_images else ()
        pixels = tuple(
            np.concatenate([sample.pixels[name][:count] for sample, count in with_images]) for name in branches
        )
        room = self.room - max(map(len, prompts))
        texts = self.reader.read(prompts, pixels, max_new_tokens=max(1, min(self.config.max_new_tokens, room)))
        return [
            Reading(f"{sample.dataset} {sample.record}", self.reference(sample), text)
            for sample, text in zip(samples, texts, strict=False)
        ]

    def prompt(self, sample: Sample) -> list[int]:
        """Everything before the first token that is learned."""
        return sample.input_ids[: int(np.argmax(sample.labels != IGNORED_LABEL))].tolist()

    def reference(self, sample: Sample) -> str:
        return str(self.maker.conversation(sample.number)["conversations"][1]["value"]).strip()


def measured(readings: list[Reading]) -> Evaluation:
    """Character error rate and normalized edit distance of answers."""
    texts, references = [one.text for one in readings], [one.reference for one in readings]
    figures = {
        "cer": character_error_rate(texts, references),
        "edit_distance": normalized_edit_distance(texts, references),
    }
    return Evaluation(figures, readings)
