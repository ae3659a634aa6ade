"""Loss, accuracy and perplexity of next tokens, as InternLM and DeLVM compute them on held-out data.

L positions, V vocabulary. The batches of a data set have T(b) tokens with a label, whose losses sum to S(b):

    loss        mean over the batches of S(b) / T(b), so that every batch weighs the same
    perplexity  exp(sum of S(b) / sum of T(b)), so that every token weighs the same
    accuracy    share of the tokens with a label that are the arg-max of their logits, the first of equals

The original rounds all three to four decimals, and computes them for each type of data too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.processing.samples.label_rules import IGNORED_LABEL


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens that have a label: their losses, the correct ones, all."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0

    def __add__(self, other: "TokenSums") -> "TokenSums":
        return TokenSums(self.loss + other.loss, self.correct + other.correct, self.tokens + other.tokens)


def sum_tokens(logits: np.ndarray, labels: np.ndarray) -> TokenSums:
    """Returns the sums of one row.

    Args:
        logits: (L, V) float32; row l predicts label l.
        labels: (L,) int32, IGNORED_LABEL where there is no target.
    """
    logits, labels = logits[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL]
    if not len(labels):
        return TokenSums()
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1, dtype=np.float64)) - shifted[np.arange(len(labels)), labels]
    return TokenSums(float(losses.sum()), int((logits.argmax(-1) == labels).sum()), len(labels))


def token_figures(rows: Sequence[TokenSums], batch_size: int = 1) -> dict[str, float]:
    """Returns loss, accuracy and perplexity, not rounded; empty if no token has a label.

    Args:
        rows: sums of each row.
        batch_size: consecutive rows of a batch; the last batch may be smaller.
    """
    batches = [sum(rows[start : start + batch_size], TokenSums()) for start in range(0, len(rows), batch_size)]
    batches = [one for one in batches if one.tokens]
    if not batches:
        return {}
    total = sum(batches, TokenSums())
    return {
        "loss": sum(one.loss / one.tokens for one in batches) / len(batches),
        "accuracy": total.correct / total.tokens,
        "perplexity": float(np.exp(total.loss / total.tokens)),
    }
