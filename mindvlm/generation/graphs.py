"""The graphs of inference, each a Cell that is compiled once per shape.

N images, T tokens an image, B batch, L length, V vocabulary.
"""

import numpy as np
from mindspore import nn, ops


class VisionGraph(nn.Cell):
    """Pixels of the family's towers -> image features (N, T, hidden)."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *pixels):
        return self.model.encode_images(*pixels)


class MergeGraph(nn.Cell):
    """Token embeddings with the image features in their places, (B, L, hidden).

    A graph of its own, so that the large prefill graph does not depend on the number of images.
    """

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, image_features, sources):
        return self.model.merge(input_ids, image_features, sources)


class PrefillGraph(nn.Cell):
    """Runs a bucket of new tokens against the cache and returns the logits (B, V) behind each row's last real one."""

    def __init__(self, language_model, caches):
        super().__init__(auto_prefix=False)
        self.language_model = language_model
        self.caches = caches

    def construct(self, embeds, positions, inv_freq, last):
        """embeds (B, L, hidden); positions (B, L) and last (B,) int32, `last` counted within the bucket."""
        hidden = self.language_model.with_cache(embeds, positions, inv_freq, self.caches)
        batch_size, length, width = hidden.shape
        rows = ops.arange(batch_size) * length + last
        return self.language_model.lm_head(ops.gather(hidden.reshape((batch_size * length, width)), rows, 0))


class DecodeGraph(nn.Cell):
    """One token a row: ids (B,) and positions (B, 1) int32 -> logits (B, V)."""

    def __init__(self, language_model, caches):
        super().__init__(auto_prefix=False)
        self.language_model = language_model
        self.caches = caches

    def construct(self, ids, positions, inv_freq):
        embeds = self.language_model.embed_tokens(ids.reshape((-1, 1)))
        hidden = self.language_model.with_cache(embeds, positions, inv_freq, self.caches)
        return self.language_model.lm_head(hidden[:, 0])


class ScoreGraph(nn.Cell):
    """Logits at every position of one pass without a cache: embeds (B, L, hidden) -> (B, L, V)."""

    def __init__(self, language_model):
        super().__init__(auto_prefix=False)
        self.language_model = language_model

    def construct(self, embeds, inv_freq):
        return self.language_model.lm_head(self.language_model(embeds, inv_freq))


def bucket_length(length: int) -> int:
    """The length that a prompt is padded to: multiples of 64, so that few graphs are built and little is computed for
    nothing."""
    return -(-length // 64) * 64


def cache_capacity(length: int, max_length: int) -> int:
    """Slots to allocate for `length` tokens: powers of two from 128, so that attention reads at most twice what is
    valid, and no more than the longest context needs."""
    capacity = 128
    while capacity < length:
        capacity *= 2
    return max(length, min(capacity, bucket_length(max_length)))


def pad_rows(rows: list[list[int]], length: int, fill: int) -> np.ndarray:
    """Rows of ids right-padded to (B, length) int32."""
    out = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
