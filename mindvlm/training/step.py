"""One training step as one compiled graph: forward, backward, clip, update."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindvlm.training.optimizer import AdamW, OptimizerConfig


class TrainStep(nn.Cell):
    """Loss and gradients of a model whose `construct` returns its loss, clipped to a global norm, and the update.

    Args:
        model: the Cell to train; parameters with `requires_grad` are updated.
        config: of the optimizer.
    """

    def __init__(self, model: nn.Cell, config: OptimizerConfig):
        super().__init__(auto_prefix=False)
        self.model = model
        self.optimizer = AdamW(model.trainable_params(), config)
        self.loss_and_gradients = ops.value_and_grad(model, None, self.optimizer.parameters)
        self.max_grad_norm = Tensor(config.max_grad_norm, ms.float32)

    def construct(self, learning_rate, *batch):
        """learning_rate a float32 scalar Tensor, batch the arguments of the model -> (loss, norm before clipping)."""
        loss, gradients = self.loss_and_gradients(*batch)
        squares = ()
        for gradient in gradients:
            squares = squares + ((gradient * gradient).sum(),)
        norm = ops.sqrt(ops.addn(squares))
        scale = ops.minimum(self.max_grad_norm / (norm + 1e-6), ops.ones_like(norm))
        clipped = ()
        for gradient in gradients:
            clipped = clipped + (gradient * scale,)
        updated = self.optimizer(clipped, learning_rate)
        return ops.depend(loss, updated), norm
