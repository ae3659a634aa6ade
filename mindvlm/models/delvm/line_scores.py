"""Losses and correct predictions of the codes of sentences, for evaluations.

B rows, L length, V codes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from mindspore import Tensor, nn

from mindvlm.core import runtime
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.packing import padded_rows
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.processing.samples.token_metrics import TokenSums, sum_tokens

# logits that are computed at a time
MAX_LOGITS = 2**24
LENGTH_STEP = 64


class CodeLogits(nn.Cell):
    """codes (B, L) int32 and inv_freq (D/2,) -> logits (B, L, V) of the next codes."""

    def __init__(self, model: DelvmModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, codes, inv_freq):
        language_model = self.model.language_model
        return language_model.lm_head(language_model(self.model.embed(codes), inv_freq))


class LineScorer:
    """Computes the sums over the targets of sentences, as an evaluation of the original program does.

    Args:
        model: in either mode; it is in that of training afterwards if it was before.
        graph_mode: whether Cells are compiled.
        ignore_code_0: code 0 is no target, as in the original program.
    """

    def __init__(self, model: DelvmModel, *, graph_mode: bool, ignore_code_0: bool = True):
        self.model, self.graph_mode, self.ignore_code_0 = model, graph_mode, ignore_code_0
        self.logits = CodeLogits(model)
        self.inv_freq = Tensor(decoder_frequencies(model.config.language_model, 1))

    def score(self, lines: Sequence[np.ndarray]) -> Iterator[TokenSums]:
        """Yields the sums of each sentence, cut to the context.

        All rows have one shape, so that a graph is compiled once.

        Args:
            lines: codes, (length,) int64 each, negative where a code is no target.
        """
        if not lines:
            return
        config = self.model.config
        length = min(config.max_length, -(-max(map(len, lines)) // LENGTH_STEP) * LENGTH_STEP)
        count = max(1, min(len(lines), MAX_LOGITS // (length * config.language_model.vocab_size)))
        for start in range(0, len(lines), count):
            rows = lines[start : start + count]
            empty = [np.zeros(1, np.int64)] * (count - len(rows))
            codes, labels = padded_rows([*rows, *empty], length, ignore_code_0=self.ignore_code_0)
            yield from map(sum_tokens, self.compute(codes)[: len(rows)], labels)

    def compute(self, codes: np.ndarray) -> np.ndarray:
        """Returns the logits (B, L, V) float32 of codes (B, L) int32."""
        trains = self.model.training
        self.model.set_train(False)
        try:
            runtime.set_mode(self.graph_mode)
            return self.logits(Tensor(codes), self.inv_freq).asnumpy().astype(np.float32)
        finally:
            self.model.set_train(trains)
