"""What the loss of a pass is: as the model gives it, averaged, scaled."""

import mindspore as ms
from mindspore import Tensor, nn, ops


class MeanLoss(nn.Cell):
    """*batch -> the mean of the pass's token losses, and 1: then all passes of a step weigh the same.

    A pass without labels has the loss 0.

    Args:
        model: *batch -> sum of the token losses, number of labels.
    """

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *batch):
        return mean_loss(*self.model(*batch))


class ScaledLoss(nn.Cell):
    """(scale, *batch) -> the model's loss times the scale, the loss, the number of labels."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, scale, *batch):
        loss, num_labels = self.model(*batch)
        return loss * scale, loss, num_labels


def mean_loss(loss, num_labels):
    """Sum of the losses and number of labels, float32 scalars -> their mean, and 1."""
    one = Tensor(1.0, ms.float32)
    return loss / ops.maximum(num_labels, one), one
