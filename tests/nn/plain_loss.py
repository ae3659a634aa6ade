"""The mean loss of a batch from all its logits: what `NextTokenLoss` computes without storing them."""

import mindspore as ms
from mindspore import ops

from mindvlm.nn.loss import IGNORED_LABEL


def next_token_loss(logits, labels):
    """Returns the mean next-token cross-entropy in float32 over labels other than -100.

    Args:
        logits: (B, L, V); position l predicts label l + 1.
        labels: (B, L) int32.

    Returns:
        A float32 scalar; 0 if every label is ignored.
    """
    vocab_size = logits.shape[-1]
    predicted = logits[:, :-1].reshape((-1, vocab_size)).astype(ms.float32)
    target = labels[:, 1:].reshape((-1,))
    counted = (target != IGNORED_LABEL).astype(ms.float32)
    safe_target = ops.maximum(target, ops.zeros_like(target))
    log_probabilities = ops.log_softmax(predicted, -1)
    picked = ops.gather_elements(log_probabilities, 1, ops.expand_dims(safe_target, 1)).reshape((-1,))
    return -(picked * counted).sum() / ops.maximum(counted.sum(), ms.Tensor(1.0, ms.float32))
