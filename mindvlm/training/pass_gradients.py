"""Loss and gradients of one pass."""

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.training.loss_scale import LossScale
from mindvlm.training.pass_loss import MeanLoss, ScaledLoss
from mindvlm.training.recompute import RecomputedGradients


class PassGradients(nn.Cell):
    """batch -> sum of the losses, number of labels, gradients of the sum (times the loss scale).

    Args:
        averages: the mean and 1 in place of sum and number.
    """

    def __init__(
        self,
        model: nn.Cell,
        parameters: list[Parameter],
        scale: LossScale | None,
        counter: Parameter | None,
        *,
        recompute: bool,
        averages: bool,
    ):
        super().__init__(auto_prefix=False)
        self.is_scaled = scale is not None
        if self.is_scaled:
            self.scale = scale.value
        self.counts = counter is not None
        if self.counts:
            self.num_passes = counter
        if recompute:
            self.compute = RecomputedGradients(model, parameters, is_scaled=self.is_scaled, averages=averages)
        else:
            mean = MeanLoss(model) if averages else model
            function = ScaledLoss(mean) if self.is_scaled else mean
            self.compute = ops.value_and_grad(function, None, ms.ParameterTuple(parameters), has_aux=True)

    def construct(self, *batch):
        if self.is_scaled:
            (_, loss, num_labels), gradients = self.compute(self.scale, *batch)
        else:
            (loss, num_labels), gradients = self.compute(*batch)
        if self.counts:
            one = ops.depend(Tensor(1, ms.int32), (loss, gradients))
            loss = ops.depend(loss, ops.assign_add(self.num_passes, one))
        return loss, num_labels, gradients
