"""Losses of the causal language models."""

import mindspore as ms
from mindspore import ops

IGNORED_LABEL = -100


def next_token_loss(logits, labels):
    """Cross-entropy of each token given those before it, averaged in float32 over labels other than -100.

    Args:
        logits: (B, L, V), those at position l predict label l + 1.
        labels: (B, L) int32.

    Returns:
        A float32 scalar; 0 when every label is ignored.
    """
    vocab_size = logits.shape[-1]
    predicted = logits[:, :-1].reshape((-1, vocab_size)).astype(ms.float32)
    target = labels[:, 1:].reshape((-1,))
    counted = (target != IGNORED_LABEL).astype(ms.float32)
    safe_target = ops.maximum(target, ops.zeros_like(target))
    log_probabilities = ops.log_softmax(predicted, -1)
    picked = ops.gather_elements(log_probabilities, 1, ops.expand_dims(safe_target, 1)).reshape((-1,))
    return -(picked * counted).sum() / ops.maximum(counted.sum(), ms.Tensor(1.0, ms.float32))
