"""Character error rate of a model in training: greedy reading with its live parameters."""

import numpy as np
from mindspore import Tensor

from mindvlm.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Generator
from mindvlm.generation.stopping import RowStop
from mindvlm.models.common.splice import splice_sources
from mindvlm.models.vary.model import VaryModel
from mindvlm.processing.stream_decoder import StreamDecoder
from mindvlm.training.data import Batch, RenderedTextBatches
from mindvlm.training.metrics import character_error_rate


class Reader:
    """Reads batches greedily through the inference graphs.

    Args:
        model: of the training step; it is back in training mode after each reading.
        batches: gives prompt layout and tokenizer.
        graph_mode: whether Cells are compiled.
    """

    def __init__(self, model: VaryModel, batches: RenderedTextBatches, *, graph_mode: bool):
        self.model = model
        self.batches = batches
        self.engine = Engine(
            model,
            placeholder_id=placeholder_id(batches),
            max_length=batches.length,
            graph_mode=graph_mode,
        )
        self.generator = Generator(self.engine)
        model.set_train(True)

    def read(self, batch: Batch) -> list[str]:
        """The model's texts of the batch's pictures."""
        batches = self.batches
        prompts = [ids[:length].tolist() for ids, length in zip(batch.input_ids, batch.prompt_lengths, strict=True)]
        stops = [RowStop(batches.processor.stop_ids, (), StreamDecoder(batches.processor.tokenizer)) for _ in prompts]
        self.model.set_train(False)
        features = self.engine.encode_images(batch.clip_pixels, batch.high_pixels)
        self.engine.reset(len(prompts))
        logits = self.engine.append(prompts, features)
        rules = GenerationConfig(max_new_tokens=batches.max_answer_tokens)
        for _ in self.generator.stream(prompts, logits, rules, stops=stops, seed=0):
            pass
        self.model.set_train(True)
        for stop in stops:
            stop.end()
        return [stop.text for stop in stops]

    def error_rate(self, test_batches: list[Batch]) -> float:
        """Character error rate over all batches."""
        texts = [text for batch in test_batches for text in self.read(batch)]
        return character_error_rate(texts, [text for batch in test_batches for text in batch.texts])


def placeholder_id(batches: RenderedTextBatches) -> int:
    """The id that stands for one row of image features."""
    return batches.processor.tokenizer.special_id(batches.processor.image_span.placeholder)


def image_sources(batches: RenderedTextBatches, input_ids: np.ndarray) -> Tensor:
    """The gather index of one picture a row."""
    num_tokens = batches.processor.image_span.num_tokens
    return Tensor(splice_sources(input_ids, len(input_ids), num_tokens, placeholder_id(batches)))


def pixel_tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    """Both towers' pixels, one Tensor where they are the same."""
    high = Tensor(batch.high_pixels)
    return (high if batch.clip_pixels is batch.high_pixels else Tensor(batch.clip_pixels)), high
