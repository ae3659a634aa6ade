"""Means over labels and over passes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.training.loss import LossScaleConfig
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep


class Product(nn.Cell):
    """Sum of the losses weight * x, and the number of labels."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor([2.0], ms.float32), name="weight")

    def construct(self, x, num_labels):
        return (self.weight * x).sum(), num_labels


@pytest.fixture(autouse=True)
def same_mode():
    mode = ms.get_context("mode")
    yield
    ms.set_context(mode=mode)


@pytest.mark.parametrize(
    ("averages", "expected"),
    # 6 over 3 labels, 1 over one; a pass without labels has no mean
    [(False, 7 / 4), (True, (2 + 1) / 2)],
)
@pytest.mark.parametrize("loss_scale", [None, LossScaleConfig(initial=64.0)])
def test_what_a_step_is_the_mean_of(averages, expected, loss_scale):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    step = TrainStep(
        Product(),
        OptimizerConfig(learning_rate=1e-3),
        accumulates=True,
        averages_passes=averages,
        loss_scale=loss_scale,
    )
    for x, num_labels in ((6.0, 3.0), (1.0, 1.0), (0.0, 0.0)):
        step.accumulate(Tensor([x], ms.float32), Tensor(num_labels, ms.float32))
    result = step.update(Tensor(1e-3, ms.float32))
    np.testing.assert_allclose(result.loss.asnumpy(), 2 * expected, rtol=1e-6)
    np.testing.assert_allclose(result.norm.asnumpy(), expected, rtol=1e-6)


class Terms(Product):
    """The same loss as two terms."""

    loss_terms = ("whole", "nothing")

    def construct(self, x, num_labels):
        loss, num_labels = super().construct(x, num_labels)
        return ops.stack((0.25 * loss, 0.75 * loss)), num_labels


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("loss_scale", [None, LossScaleConfig(initial=64.0)])
def test_the_sum_of_the_terms_trains(accumulates, loss_scale):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    results = []
    for kind in (Product, Terms):
        step = TrainStep(kind(), OptimizerConfig(learning_rate=1e-3), accumulates=accumulates, loss_scale=loss_scale)
        batch, rate = (Tensor([6.0], ms.float32), Tensor(3.0, ms.float32)), Tensor(1e-3, ms.float32)
        if accumulates:
            step.accumulate(*batch)
        results.append(step.update(rate) if accumulates else step(rate, *batch))
    one, two = results
    np.testing.assert_allclose(two.loss.asnumpy(), np.array([0.25, 0.75]) * one.loss.asnumpy(), rtol=1e-6)
    assert two.norm.asnumpy() == one.norm.asnumpy() == 2.0
    assert two.is_finite.asnumpy()


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_step_without_labels_changes_nothing(averages, accumulates):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = Product()
    config = OptimizerConfig(learning_rate=1e-1, weight_decay=0.5)
    step = TrainStep(model, config, accumulates=accumulates, averages_passes=averages)
    rate, values = Tensor(1e-1, ms.float32), []
    for x, num_labels in ((6.0, 3.0), (0.0, 0.0)):
        batch = Tensor([x], ms.float32), Tensor(num_labels, ms.float32)
        if accumulates:
            step.accumulate(*batch)
        result = step.update(rate) if accumulates else step(rate, *batch)
        assert result.num_labels.asnumpy() == (min(num_labels, 1) if averages else num_labels)
        values.append((model.weight.asnumpy().item(), *(one.asnumpy().tolist() for one in step.state.values())))
    assert values[0] == values[1] and values[0][0] != 2.0
    assert result.is_finite.asnumpy()
