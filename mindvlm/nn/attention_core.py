"""Softmax attention that saves only its inputs and output for the backward pass.

The backward pass recomputes the attention probabilities, as in arXiv 2205.14135 but with whole rows of scores instead
of tiles. Queries are processed in slices, so only one slice of scores is in memory at a time.

L queries, S keys, D head dimension; the leading axes are (batch, heads), or one axis for both. With fewer key heads
than query heads (arXiv 2305.13245), the consecutive query heads of a key head are stacked into one block of queries, so
no key is repeated.
"""

from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

# Maximum number of scores per head in one slice.
MAX_SCORES_PER_HEAD = 2**21

# Causal attention splits its queries into at most this many slices and skips the keys after a slice's last query: n
# slices do (n + 1) / 2n of the work. Each slice adds compile time, so short sequences are not split.
NUM_CAUSAL_SLICES = 4
MIN_CAUSAL_SLICE = 512


@functools.cache
def attention_core() -> AttentionCore:
    """Returns the shared AttentionCore, which is compiled once for all layers."""
    return AttentionCore()


@functools.cache
def causal_attention_core(*, float32_scores: bool = False) -> CausalAttentionCore:
    """Returns the shared CausalAttentionCore or Float32CausalAttentionCore."""
    return Float32CausalAttentionCore() if float32_scores else CausalAttentionCore()


@functools.cache
def segment_attention_core() -> SegmentAttentionCore:
    """Returns the shared SegmentAttentionCore."""
    return SegmentAttentionCore()


class AttentionCore(nn.Cell):
    """softmax(query key^T) value with all keys visible and the softmax in float32. The query must already be scaled.

    query (..., H, L, D), key (..., K, S, D), value (..., K, S, D') -> (..., H, L, D').
    """

    def __init__(self):
        super().__init__()
        self.by_rows = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()
        self.by_columns = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.sum = ops.ReduceSum(keep_dims=True)
        self.slice = ops.Slice()
        self.tile = ops.Tile()

    def construct(self, query, key, value):
        return self.attended(query, key, value, None)

    def bprop(self, query, key, value, out, dout):
        return self.gradients(query, key, value, None, out, dout)

    def attended(self, query, key, value, segment_ids):
        """Returns the output; `segment_ids` are those of `SegmentAttentionCore`."""
        outs = ()
        for start, stop, num_keys in self.slices(query.shape[-2], key.shape[-2]):
            part = stack_heads(self.rows(query, start, stop), key)
            if start > 0:
                # sequential: parallel slices would all be in memory
                part = ops.depend(part, outs[-1])
            seen_key = self.rows(key, 0, num_keys)
            probabilities = self.probabilities(part, seen_key, stop - start, segment_ids).astype(value.dtype)
            out = self.product(probabilities, self.rows(value, 0, num_keys))
            outs = outs + (split_heads(out, query, stop - start),)
        return join(outs)

    def gradients(self, query, key, value, segment_ids, out, dout):
        """Returns the gradients of query, key and value."""
        # keeps the recomputation out of the forward pass
        query, key = ops.depend(query, dout), ops.depend(key, dout)
        value, out = ops.depend(value, dout), ops.depend(out, dout)
        query_parts, key_parts, value_parts = (), (), ()
        for start, stop, num_keys in self.slices(query.shape[-2], key.shape[-2]):
            part = stack_heads(self.rows(query, start, stop), key)
            out_part = stack_heads(self.rows(out, start, stop), key)
            dout_part = stack_heads(self.rows(dout, start, stop), key)
            if start > 0:
                part = ops.depend(part, query_parts[-1])
            seen_key, seen_value = self.rows(key, 0, num_keys), self.rows(value, 0, num_keys)
            probabilities = self.probabilities(part, seen_key, stop - start, segment_ids)
            by_scores = self.scores_gradient(probabilities, seen_value, out_part, dout_part)
            query_parts = query_parts + (split_heads(self.product(by_scores, seen_key), query, stop - start),)
            key_parts = key_parts + (lengthen(self.by_columns(by_scores, part), key.shape[-2]),)
            by_value = self.by_columns(probabilities.astype(value.dtype), dout_part)
            value_parts = value_parts + (lengthen(by_value, key.shape[-2]),)
        return join(query_parts), add(key_parts), add(value_parts)

    def slices(self, num_queries, num_keys):
        return full_slices(num_queries, num_keys)

    def rows(self, x, start, stop):
        """Returns x[..., start:stop, :]. Slice copies whole rows; indexing copies single elements."""
        if start == 0 and stop == x.shape[-2]:
            return x
        leading = x.shape[:-2]
        begin = (0,) * len(leading) + (start, 0)
        return self.slice(x, begin, leading + (stop - start, x.shape[-1]))

    def probabilities(self, query, key, size, segment_ids):
        """Returns the probabilities (..., queries, keys) float32 of a slice of `size` queries per head."""
        return self.softmax(self.scores(query, key))

    def scores(self, query, key):
        return self.by_rows(query, key).astype(ms.float32)

    def scores_gradient(self, probabilities, value, out, dout):
        """Returns p * (dout value^T - sum(dout * out)) of a slice."""
        total = self.sum((dout * out).astype(ms.float32), -1)
        if dout.dtype == ms.float32:
            # subtracting inside the product saves a tensor of the size of the scores
            ones = ops.ones(value.shape[:-1] + (1,), ms.float32)
            difference = self.by_rows(ops.concat((dout, -total), -1), ops.concat((value, ones), -1))
        else:
            # 16 bits cannot hold the sum
            difference = self.by_rows(dout, value).astype(ms.float32)
            difference = difference - self.tile(total, (1,) * (len(value.shape) - 1) + (value.shape[-2],))
        return (probabilities * difference).astype(dout.dtype)


class CausalAttentionCore(AttentionCore):
    """softmax(query key^T + mask) value, where query i sees the keys 0 to i. L = S.

    Skips the keys after each slice and needs no mask of size (L, S).
    """

    def slices(self, num_queries, num_keys):
        return causal_slices(num_queries)

    def probabilities(self, query, key, size, segment_ids):
        return self.softmax(self.causal_scores(query, key, size))

    def causal_scores(self, query, key, size):
        """Returns the scores, masked in the last `size` keys, which are at the positions of the queries."""
        num_earlier = key.shape[-2] - size
        scores = self.scores(query, self.rows(key, num_earlier, num_earlier + size))
        # depends on the query: a training step would compute the tiled constant up front and keep it for every layer
        mask = ops.depend(future_mask(size), query)
        scores = scores + self.tile(mask, scores.shape[:-2] + (query.shape[-2] // size, 1))
        if num_earlier > 0:
            scores = ops.concat((self.scores(query, self.rows(key, 0, num_earlier)), scores), -1)
        return scores


class SegmentAttentionCore(CausalAttentionCore):
    """`CausalAttentionCore` where a query sees the keys of its own segment only.

    query (B, H, L, D), key and value (B, K, L, D), segment_ids (B, L) int32. The mask of one slice is in memory.
    """

    def construct(self, query, key, value, segment_ids):
        return self.attended(query, key, value, segment_ids)

    def bprop(self, query, key, value, segment_ids, out, dout):
        return (*self.gradients(query, key, value, segment_ids, out, dout), ops.zeros_like(segment_ids))

    def probabilities(self, query, key, size, segment_ids):
        num_keys = key.shape[-2]
        own = segment_ids[:, num_keys - size : num_keys].reshape((-1, 1, size, 1))
        others = own != segment_ids[:, :num_keys].reshape((-1, 1, 1, num_keys))
        hidden = others.astype(ms.float32) * float(np.finfo(np.float32).min)
        hidden = self.tile(hidden, (1, key.shape[1], query.shape[-2] // size, 1))
        return self.softmax(self.causal_scores(query, key, size) + hidden)


class Float32CausalAttentionCore(CausalAttentionCore):
    """`CausalAttentionCore` with float32 query-key products, which exceed the range of float16 in Phi-2."""

    def scores(self, query, key):
        return self.by_rows(query.astype(ms.float32), key.astype(ms.float32))


def stack_heads(x, key):
    """Stacks the query heads of each key head: x (..., H, L, D), key (..., K, S, D) -> (..., K, H/K * L, D)."""
    return x.reshape(key.shape[:-2] + (-1, x.shape[-1]))


def split_heads(x, query, size):
    """Inverse of `stack_heads`: x (..., K, H/K * size, D'), query (..., H, L, D) -> (..., H, size, D')."""
    return x.reshape(query.shape[:-2] + (size, x.shape[-1]))


@ops.constexpr
def full_slices(num_queries: int, num_keys: int) -> tuple[tuple[int, int, int], ...]:
    """Returns (start, stop, number of keys) of each slice of queries."""
    size = max(1, MAX_SCORES_PER_HEAD // num_keys)
    starts = range(0, num_queries, size)
    return tuple((start, min(start + size, num_queries), num_keys) for start in starts)


@ops.constexpr
def causal_slices(length: int) -> tuple[tuple[int, int, int], ...]:
    """Returns `full_slices` for causal attention, where a slice needs only the keys up to its end."""
    size = max(MIN_CAUSAL_SLICE, -(-length // NUM_CAUSAL_SLICES))
    size = min(size, max(1, MAX_SCORES_PER_HEAD // length))
    stops = [min(start + size, length) for start in range(0, length, size)]
    return tuple((start, stop, stop) for start, stop in zip([0, *stops], stops, strict=False))


@ops.constexpr
def future_mask(size: int) -> Tensor:
    """Returns a causal mask (size, size) float32: 0 up to the diagonal, the float32 minimum above it."""
    return Tensor(np.triu(np.full((size, size), np.finfo(np.float32).min, np.float32), 1))


def lengthen(x, length):
    """Pads x (..., S, D) with zeros to S = length."""
    missing = length - x.shape[-2]
    if missing == 0:
        return x
    zeros = ops.zeros(x.shape[:-2] + (missing, x.shape[-1]), x.dtype)
    return ops.concat((x, ops.depend(zeros, x)), -2)


def join(parts):
    return parts[0] if len(parts) == 1 else ops.concat(parts, -2)


def add(parts):
    return parts[0] if len(parts) == 1 else ops.addn(parts)
