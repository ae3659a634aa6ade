"""Selection of the next token of every slot.

B rows, V vocabulary, S maximum ids of a row, K candidates.
"""

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.request import Slot
from mindvlm.nn.layout import widen

# Sampling among the top few tokens avoids sorting the vocabulary.
FEW_CANDIDATES = 128

NOT_FINITE = -1
"""The id of a row whose logits contain NaN or infinity."""


class GreedyGraph(nn.Cell):
    """Logits (B, V) -> ids of the maxima, (B,) int32; `NOT_FINITE` for rows with NaN or infinity."""

    def __init__(self):
        super().__init__()
        self.argmax = ops.Argmax(axis=-1, output_type=ms.int32)

    def construct(self, logits):
        logits = logits.astype(ms.float32)
        return where_finite(logits, self.argmax(logits))


class SamplingGraph(nn.Cell):
    """Logits (B, V) -> next ids (B,) int32; `NOT_FINITE` for rows with NaN or infinity. Options are inputs, so their
    values never trigger a compilation.

    The order of the rules is that of Hugging Face: repetition penalty (arXiv 1909.05858), no repeated n-gram,
    temperature, top-k, top-p (arXiv 1904.09751). Each row samples with one uniform number from the host, so a seed
    produces the same text on every device.

    Args:
        num_candidates: K, the maximum number of tokens to sample from; 0 if no row samples. A row's result does not
            depend on K.
    """

    def __init__(self, num_candidates: int):
        super().__init__()
        self.num_candidates = num_candidates
        self.top_k = ops.TopK(sorted=True)
        self.cumsum = ops.CumSum()
        self.argmax = ops.Argmax(axis=-1, output_type=ms.int32)

    def construct(self, logits, seen, banned, penalty, do_sample, temperature, top_k, top_p, uniform):
        """Selects a token for each row.

        Args:
            logits: (B, V).
            seen: (B, S) int32, ids subject to `penalty`; V for none.
            banned: (B, S) int32, ids that must not follow; V for none.
            penalty, temperature, top_p: (B, 1) float32.
            do_sample: (B,) bool; False selects the maximum.
            top_k: (B, 1) int32 from 1 to K.
            uniform: (B, 1) float32 in [0, 1).
        """
        given = logits.astype(ms.float32)
        logits = self.penalised(given, seen, penalty)
        logits = ops.select(marked(banned, logits), ops.full_like(logits, -1e30), logits)
        ids = self.argmax(logits)
        if self.num_candidates > 0:
            ids = ops.select(do_sample, self.draw(logits, temperature, top_k, top_p, uniform), ids)
        return where_finite(given, ids)

    def penalised(self, logits, seen, penalty):
        """Applies the repetition penalty to the logits of the ids in `seen`."""
        penalty = widen(penalty, logits)
        lowered = ops.select(logits > 0, logits / penalty, logits * penalty)
        return ops.select(marked(seen, logits), lowered, logits)

    def draw(self, logits, temperature, top_k, top_p, uniform):
        """Samples ids (B,) from each row's `top_k` most likely tokens, restricted to the probability mass `top_p`."""
        candidates, ids = self.top_k(logits / widen(temperature, logits), self.num_candidates)
        places = ops.arange(self.num_candidates).astype(ms.int32).reshape((1, -1))
        # not a softmax, whose rounding depends on K
        weights = ops.exp(candidates - widen(candidates[:, :1], candidates)) * (places < top_k).astype(ms.float32)
        cumulative = self.cumsum(weights, 1)
        kept = ops.logical_or(cumulative - weights < top_p * cumulative[:, -1:], top_p >= 1.0)
        weights = weights * kept.astype(ms.float32)
        cumulative = self.cumsum(weights, 1)
        passed = (cumulative <= uniform * cumulative[:, -1:]).astype(ms.int32).sum(-1)
        # rounding may select a position after the last token with non-zero probability
        last = (weights > 0).astype(ms.int32).sum(-1) - 1
        choice = ops.minimum(passed, last).reshape((-1, 1))
        return ops.gather_elements(ids, 1, choice).reshape((-1,)).astype(ms.int32)


def greedy_ids(logits: Tensor) -> np.ndarray:
    """Computes `GreedyGraph` on the host."""
    values = logits.asnumpy()
    with np.errstate(invalid="ignore", over="ignore"):
        is_finite = np.isfinite(values.sum(-1, dtype=np.float32))
    return np.where(is_finite, values.argmax(-1), NOT_FINITE)


def where_finite(logits, ids):
    """Returns the ids (B,), and `NOT_FINITE` for rows of the logits (B, V) float32 that contain NaN or infinity."""
    return ops.select(ops.isfinite(logits.sum(-1)), ids, ops.full_like(ids, NOT_FINITE))


def marked(ids, logits):
    """Returns (B, V) bool, true at the ids (B, S) of each row; V marks nothing."""
    batch_size, vocab_size = logits.shape
    rows = ops.broadcast_to(ops.arange(batch_size).astype(ms.int32).reshape((-1, 1)), ids.shape)
    ones = ops.ones_like(ids).astype(ms.float32)
    table = ops.scatter_nd(ops.stack((rows, ids), -1), ones, (batch_size, vocab_size + 1))
    return table[:, :vocab_size] > 0


class Sampler:
    """Selects the next token of every running slot with a graph, or on the host.

    Args:
        run: see `GraphRunner.run`.
        vocab_size: V.
        max_ids: S, the maximum number of ids of a row.
    """

    def __init__(self, run: Callable, *, vocab_size: int, max_ids: int):
        self.run, self.vocab_size, self.max_ids = run, vocab_size, max_ids
        # a graph costs as much time as a step of a small model, but another device would send all logits to the host
        self.greedy = greedy_ids if ms.get_context("device_target") == "CPU" else GreedyGraph()
        few = min(FEW_CANDIDATES, vocab_size)
        self.graphs = {count: SamplingGraph(count) for count in (0, few, vocab_size)}

    def choose(self, logits: Tensor, slots: Sequence[Slot]) -> np.ndarray:
        """Returns the next ids (B,) for logits (B, V), or `NOT_FINITE`; values of rows without a slot are undefined."""
        options = [slot.request.options for slot in slots]
        if all(map(is_plain, options)):
            chosen = self.run("decode", self.greedy, logits)
            return chosen if isinstance(chosen, np.ndarray) else chosen.asnumpy()
        needed = max(self.num_candidates(option) for option in options)
        graph = self.graphs[min(count for count in self.graphs if count >= needed)]
        return self.run("decode", graph, logits, *self.rules(slots, len(logits))).asnumpy()

    def num_candidates(self, options: GenerationConfig) -> int:
        """Returns the number of tokens to sample from; 0 without sampling."""
        return min(options.top_k or self.vocab_size, self.vocab_size) if options.do_sample else 0

    def rules(self, slots: Sequence[Slot], batch_size: int) -> list[Tensor]:
        """Returns the inputs of `SamplingGraph` besides the logits."""
        seen, banned = np.full((2, batch_size, self.max_ids), self.vocab_size, np.int32)
        penalty, temperature, top_p, uniform = np.ones((4, batch_size, 1), np.float32)
        do_sample, top_k = np.zeros(batch_size, np.bool_), np.ones((batch_size, 1), np.int32)
        for slot in slots:
            row, options = slot.row, slot.request.options
            history = slot.history
            if options.repetition_penalty != 1:
                # placeholders may be negative
                ids = np.unique(history[history >= 0])
                seen[row, : len(ids)], penalty[row] = ids, options.repetition_penalty
            ids = repeating_ids(history, options.no_repeat_ngram_size)
            banned[row, : len(ids)] = ids
            if options.do_sample:
                do_sample[row], temperature[row], top_p[row] = True, options.temperature, options.top_p
                top_k[row], uniform[row] = self.num_candidates(options), slot.random.random()
        return [Tensor(array) for array in (seen, banned, penalty, do_sample, temperature, top_k, top_p, uniform)]


def is_plain(options: GenerationConfig) -> bool:
    """Whether decoding is greedy without repetition rules."""
    return not options.do_sample and options.repetition_penalty == 1 and options.no_repeat_ngram_size == 0


def repeating_ids(history: np.ndarray, ngram_size: int) -> np.ndarray:
    """Returns the ids that would repeat an n-gram of the history (L,), (C,) int32; none for size 0."""
    if ngram_size == 0 or len(history) < ngram_size:
        return history[:0]
    ngrams = np.lib.stride_tricks.sliding_window_view(history, ngram_size)
    begun = history[len(history) - ngram_size + 1 :]
    followers = np.unique(ngrams[(ngrams[:, :-1] == begun).all(1), -1])
    return followers[followers >= 0]
