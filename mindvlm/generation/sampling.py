"""Choosing the next token inside a graph.

B batch, V vocabulary, S history slots, K kept candidates.
"""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.config import GenerationConfig

EMPTY = -1


class Sampler(nn.Cell):
    """Logits (B, V) -> next ids (B,) int32, by the rules of a `GenerationConfig`.

    Order as in Hugging Face: repetition penalty (arXiv 1909.05858), no repeated n-gram, temperature, top-k, top-p
    (arXiv 1904.09751). One uniform number per row drives the draw, so a seed gives the same text on every device.
    The tokens so far live in `history` on the device and never travel.

    Args:
        config: the rules; fixed for the life of the graph.
        batch_size: B.
        vocab_size: V.
        num_slots: S, the most tokens that a row can reach.
    """

    def __init__(self, config: GenerationConfig, *, batch_size: int, vocab_size: int, num_slots: int):
        super().__init__()
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self.do_sample = config.do_sample
        self.temperature = config.temperature
        self.num_candidates = min(config.top_k or vocab_size, vocab_size)
        self.top_p = config.top_p
        self.penalty = config.repetition_penalty
        self.ngram = config.no_repeat_ngram_size
        self.keeps_history = self.penalty != 1.0 or self.ngram > 0
        self.history = Parameter(
            initializer("zeros", (batch_size, num_slots), ms.int32), name="history", requires_grad=False
        )
        self.write = ops.ScatterNdUpdate()
        self.top_k = ops.TopK(sorted=True)
        self.cumsum = ops.CumSum()
        self.argmax = ops.Argmax(axis=-1, output_type=ms.int32)
        self.rows = Tensor(list(range(batch_size)), ms.int32)
        self.slots = Tensor(list(range(num_slots)), ms.int32)

    def construct(self, logits, counts, uniform):
        """counts (B,) int32, how many tokens each row has; uniform (B,) float32 in [0, 1)."""
        logits = logits.astype(ms.float32)
        history = self.history.value()
        if self.penalty != 1.0:
            logits = self.penalise_repetition(logits, history)
        if self.ngram > 0:
            logits = self.forbid_repeated_ngrams(logits, history, counts)
        ids = self.draw(logits, uniform) if self.do_sample else self.argmax(logits)
        if self.keeps_history:
            self.write(self.history, ops.stack((self.rows, counts), -1), ids)
        return ids

    def scatter_over_vocabulary(self, ids, values):
        """Sums values (B, S) into (B, V) at ids (B, S); EMPTY ids fall off the end."""
        columns = ops.select(ids < 0, ops.full_like(ids, self.vocab_size), ids)
        rows = ops.broadcast_to(self.rows.reshape((-1, 1)), columns.shape)
        table = ops.scatter_nd(ops.stack((rows, columns), -1), values, (self.batch_size, self.vocab_size + 1))
        return table[:, : self.vocab_size]

    def penalise_repetition(self, logits, history):
        seen = self.scatter_over_vocabulary(history, ops.ones_like(history).astype(ms.float32)) > 0
        penalised = ops.select(logits > 0, logits / self.penalty, logits * self.penalty)
        return ops.select(seen, penalised, logits)

    def forbid_repeated_ngrams(self, logits, history, counts):
        """Bans every token that once followed the row's last n - 1 tokens."""
        prefix = self.ngram - 1
        num_windows = self.num_slots - prefix
        starts = self.slots[:num_windows].reshape((1, -1))
        matches = starts + prefix < counts.reshape((-1, 1))
        for i in range(prefix):
            last = ops.maximum(counts - prefix + i, ops.zeros_like(counts)).reshape((-1, 1))
            token = ops.gather_elements(history, 1, last)
            matches = ops.logical_and(matches, history[:, i : i + num_windows] == token)
        matches = ops.logical_and(matches, counts.reshape((-1, 1)) >= prefix)
        followers = history[:, prefix : prefix + num_windows]
        banned = self.scatter_over_vocabulary(followers, matches.astype(ms.float32)) > 0
        return ops.select(banned, ops.full_like(logits, -1e30), logits)

    def draw(self, logits, uniform):
        candidates, ids = self.top_k(logits / self.temperature, self.num_candidates)
        probabilities = ops.softmax(candidates, -1)
        cumulative = self.cumsum(probabilities, 1)
        if self.top_p < 1.0:
            kept = cumulative - probabilities < self.top_p
            probabilities = probabilities * kept.astype(ms.float32)
            cumulative = self.cumsum(probabilities, 1)
        total = cumulative[:, -1:]
        passed = (cumulative <= uniform.reshape((-1, 1)) * total).astype(ms.int32).sum(-1)
        # rounding may leave the draw behind the last token that still has probability
        last = (probabilities > 0).astype(ms.int32).sum(-1) - 1
        choice = ops.minimum(passed, last).reshape((-1, 1))
        return ops.gather_elements(ids, 1, choice).reshape((-1,)).astype(ms.int32)
