"""Adapted Linears: what they compute, their gradients, how they start, and the head's loss."""

import math

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn, ops

from mindvlm.core.errors import UserError
from mindvlm.nn.dropout import NUM_ROWS, RowDropout, mask_table, new_counter
from mindvlm.nn.linear import BiasedHead, Head, Linear
from mindvlm.nn.lora import LoraConfig, adapt, adapted_linears, first_values

CONFIG = LoraConfig(rank=3, alpha=5.0)


def fill(cell: nn.Cell) -> None:
    for number, (_, parameter) in enumerate(cell.parameters_and_names()):
        values = np.random.default_rng(number).standard_normal(parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(values))


def adapted(kind=Linear, **options) -> Linear:
    linear = kind(6, 4, **options)
    adapt(linear, CONFIG)
    fill(linear)
    return linear


def torch_output(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """As PEFT's Linear layer computes it."""
    y = torch.nn.functional.linear(x, weights["weight"], weights.get("bias"))
    return y + (x @ weights["lora_A"].T) @ weights["lora_B"].T * (CONFIG.alpha / CONFIG.rank)


def as_torch(cell: nn.Cell) -> dict[str, torch.Tensor]:
    named = cell.parameters_and_names()
    return {name: torch.tensor(parameter.asnumpy(), requires_grad=True) for name, parameter in named}


@pytest.fixture(params=[ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def mode(request):
    """Both modes; the process is left as it was."""
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients_are_those_of_peft(has_bias):
    linear = adapted(has_bias=has_bias)
    names = [name for name, _ in linear.parameters_and_names()]
    assert sorted(names) == sorted(["weight", *["bias"] * has_bias, "lora_A", "lora_B"])
    x = np.random.default_rng(9).standard_normal((2, 5, 6)).astype(np.float32)
    weights = as_torch(linear)
    expected = torch_output(torch.tensor(x), weights)
    expected.square().sum().backward()
    parameters = ms.ParameterTuple(list(linear.get_parameters()))

    class Squares(nn.Cell):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def construct(self, x):
            y = self.linear(x)
            return (y * y).sum(), y

    (_, y), gradients = ops.value_and_grad(Squares(), None, parameters, has_aux=True)(Tensor(x))
    np.testing.assert_allclose(y.asnumpy(), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    for (name, _), gradient in zip(linear.parameters_and_names(), gradients, strict=True):
        np.testing.assert_allclose(gradient.asnumpy(), weights[name].grad.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_fresh_adapter_changes_nothing():
    linear = Linear(6, 4)
    fill(linear)
    x = Tensor(np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32))
    before = linear(x).asnumpy()
    adapt(linear, CONFIG)
    for name in ("lora_A", "lora_B"):
        parameter = getattr(linear, name)
        parameter.set_data(Tensor(first_values(name, parameter.shape, 1)))
    np.testing.assert_array_equal(linear(x).asnumpy(), before)
    assert linear.lora_A.asnumpy().any() and not linear.lora_B.asnumpy().any()
    assert list(adapted_linears(nn.SequentialCell(Linear(2, 2), linear))) == ["1"]


def test_a_starts_as_in_peft():
    values = first_values("x.lora_A", (64, 400), 3)
    layer = torch.nn.Linear(400, 64, bias=False)
    torch.nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    assert np.abs(values).max() <= 1 / 20 and np.abs(values).max() > 0.0499
    np.testing.assert_allclose(values.std(), layer.weight.detach().numpy().std(), rtol=0.02)
    np.testing.assert_array_equal(values, first_values("x.lora_A", (64, 400), 3))
    for other in (first_values("y.lora_A", (64, 400), 3), first_values("x.lora_A", (64, 400), 4)):
        assert not np.array_equal(values, other)


@pytest.mark.parametrize("kind", [Head, BiasedHead])
def test_the_loss_of_an_adapted_head_is_that_of_its_logits(kind):
    head = adapted(kind)
    states = np.random.default_rng(5).standard_normal((2, 4, 6)).astype(np.float32)
    labels = np.array([[0, 1, 2, 3], [-100, 3, -100, 1]], np.int32)
    loss, count = head.loss_sum(Tensor(states), Tensor(labels))
    weights = as_torch(head)
    logits = torch_output(torch.tensor(states), weights)
    np.testing.assert_allclose(head(Tensor(states)).asnumpy(), logits.detach().numpy(), rtol=1e-5, atol=1e-5)
    target = torch.tensor(labels[:, 1:].reshape(-1)).long()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 4), target, reduction="sum")
    np.testing.assert_allclose(loss.asnumpy(), expected.detach().numpy(), rtol=1e-5)
    assert float(count.asnumpy()) == 5


def test_dropout_is_before_a_alone_and_of_the_own_columns():
    linear, counter = Linear(6, 4, has_bias=False), new_counter()
    dropout = RowDropout(0.5, 12, index=0, counter=counter, columns=(6, 12))
    adapt(linear, CONFIG, dropout=dropout)
    fill(linear)
    x = np.ones((2, 6), np.float32)
    weights = {name: value.detach() for name, value in as_torch(linear).items()}
    linear.set_train(False)
    np.testing.assert_allclose(linear(Tensor(x)).asnumpy(), torch_output(torch.tensor(x), weights), rtol=1e-5)
    linear.set_train(True)
    masks = mask_table(0.5, 12)[[0, 617], 6:]
    reduced = (x * masks) @ weights["lora_A"].numpy().T * (5 / 3)
    expected = x @ weights["weight"].numpy().T + reduced @ weights["lora_B"].numpy().T
    np.testing.assert_allclose(linear(Tensor(x)).asnumpy(), expected, rtol=1e-5)


@pytest.mark.usefixtures("mode")
def test_gradients_pass_the_same_masks():
    linear = Linear(6, 4, has_bias=False)
    adapt(linear, CONFIG, dropout=RowDropout(0.5, 6, index=1, counter=new_counter()))
    fill(linear)
    linear.set_train()
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    masks = torch.tensor(mask_table(0.5, 6)[(83 + 617 * np.arange(3)) % NUM_ROWS])
    weights = as_torch(linear)
    seen = torch.tensor(x, requires_grad=True)
    low_rank = (seen * masks) @ weights["lora_A"].T @ weights["lora_B"].T * (5 / 3)
    (seen @ weights["weight"].T + low_rank).square().sum().backward()
    parameters = ms.ParameterTuple(list(linear.get_parameters()))

    class Squares(nn.Cell):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def construct(self, x):
            y = self.linear(x)
            return (y * y).sum()

    by_x, gradients = ops.grad(Squares(), 0, parameters)(Tensor(x))
    np.testing.assert_allclose(by_x.asnumpy(), seen.grad.numpy(), rtol=1e-4, atol=1e-4)
    for (name, _), gradient in zip(linear.parameters_and_names(), gradients, strict=True):
        np.testing.assert_allclose(gradient.asnumpy(), weights[name].grad.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"targets": []}])
def test_impossible_settings(bad):
    with pytest.raises(UserError, match=f"lora.{next(iter(bad))} is "):
        LoraConfig(**bad)
