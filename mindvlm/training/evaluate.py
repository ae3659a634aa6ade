"""Character error rate of a model in training: greedy reading without a cache, over its live parameters."""

import numpy as np
from mindspore import Tensor, nn

from mindvlm.models.common.splice import splice_sources
from mindvlm.models.vary.model import VaryModel
from mindvlm.training.data import Batch, RenderedTextBatches
from mindvlm.training.metrics import character_error_rate


class ImageFeatures(nn.Cell):
    """The vision part of a model as a graph of its own."""

    def __init__(self, model: VaryModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, clip_pixels, high_pixels):
        return self.model.encode_images(clip_pixels, high_pixels)


class Logits(nn.Cell):
    """Logits after every position, (B, L, V)."""

    def __init__(self, model: VaryModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, features, sources, inv_freq):
        embeds = self.model.merge(input_ids, features, sources)
        return self.model.language_model.lm_head(self.model.language_model(embeds, inv_freq))


class Reader:
    """Reads batches greedily.

    Args:
        model: of the training step; its parameters are used as they are at the time.
        batches: gives prompt layout and tokenizer.
        inv_freq: rotary frequencies of the decoder.
    """

    def __init__(self, model: VaryModel, batches: RenderedTextBatches, inv_freq: Tensor):
        self.features = ImageFeatures(model)
        self.logits = Logits(model)
        self.batches = batches
        self.inv_freq = inv_freq

    def read(self, batch: Batch) -> list[str]:
        """The model's texts of the batch's pictures."""
        batches = self.batches
        ids = batch.input_ids.copy()
        rows = np.arange(len(ids))
        for row, length in enumerate(batch.prompt_lengths):
            ids[row, length:] = batches.fill_id
        sources = image_sources(batches, ids)
        clip, high = pixel_tensors(batch)
        features = self.features(clip, high)
        is_done = np.zeros(len(ids), dtype=bool)
        for offset in range(batches.max_answer_tokens):
            places = batch.prompt_lengths + offset
            logits = self.logits(Tensor(ids), features, sources, self.inv_freq).asnumpy()
            chosen = logits[rows, places - 1].argmax(axis=-1)
            ids[rows, places] = np.where(is_done, batches.fill_id, chosen)
            is_done |= np.isin(chosen, batches.processor.stop_ids)
            if is_done.all():
                break
        answers = [row[length:] for row, length in zip(ids, batch.prompt_lengths, strict=True)]
        return [batches.processor.tokenizer.decode(answer, skip_special=True) for answer in answers]

    def error_rate(self, test_batches: list[Batch]) -> float:
        """Character error rate over all batches."""
        texts = [text for batch in test_batches for text in self.read(batch)]
        return character_error_rate(texts, [text for batch in test_batches for text in batch.texts])


def image_sources(batches: RenderedTextBatches, input_ids: np.ndarray) -> Tensor:
    """The gather index of one picture a row."""
    span = batches.processor.image_span
    pad_id = batches.processor.tokenizer.special_id(span.placeholder)
    return Tensor(splice_sources(input_ids, len(input_ids), span.num_tokens, pad_id))


def pixel_tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    """Both towers' pixels, one Tensor where they are the same."""
    high = Tensor(batch.high_pixels)
    return (high if batch.clip_pixels is batch.high_pixels else Tensor(batch.clip_pixels)), high
