import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.core.errors import UserError
from mindvlm.training.optimizer import AdamW, OptimizerConfig
from mindvlm.training.step import TrainStep

SHAPES = {"layers.0.q_proj.weight": (5, 3), "layers.0.q_proj.bias": (5,), "layers.0.norm1.weight": (3,)}


class Affine(nn.Cell):
    """Squared error of x W^T + b against y."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = Parameter(Tensor(weight), name="weight")
        self.bias = Parameter(Tensor(bias), name="bias")

    def construct(self, x, y):
        error = (x.expand_dims(1) * self.weight).sum(-1) + self.bias - y
        return (error * error).sum(), ops.full_like(y, 1.0).sum()


@pytest.mark.parametrize(("eps", "power"), [(1e-8, 0.0), (1e-2, 0.0), (1e-8, 2.0)])
def test_updates_equal_torch_adamw(eps, power):
    rng = np.random.default_rng(0)
    config = OptimizerConfig(learning_rate=0.02, betas=[0.9, 0.5], beta2_power=power, eps=eps, weight_decay=0.1)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    parameters = [Parameter(Tensor(value), name=name) for name, value in start.items()]
    optimizer = AdamW(parameters, config)
    twins = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [
        {"params": [twin for name, twin in twins.items() if config.decays(name)], "weight_decay": 0.1},
        {"params": [twin for name, twin in twins.items() if not config.decays(name)], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.5), eps=eps)
    for step in range(5):
        rate = 0.02 / (step + 1)
        gradients = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        optimizer(tuple(Tensor(gradients[name]) for name in SHAPES), Tensor(rate, ms.float32))
        for name, twin in twins.items():
            twin.grad = torch.tensor(gradients[name])
        for group in reference.param_groups:
            group["lr"] = rate
            # rises at the fourth step
            group["betas"] = (0.9, max(0.5, 1 - max(step, 1) ** -power))
        reference.step()
    for parameter, (name, twin) in zip(parameters, twins.items(), strict=True):
        np.testing.assert_allclose(parameter.asnumpy(), twin.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_decay_leaves_out_biases_and_norms():
    norms = frozenset({"layers.0.norm1.weight"})
    config = OptimizerConfig(learning_rate=1.0)
    assert [config.decays(name, norms) for name in SHAPES] == [True, False, False]
    assert [config.decays(name) for name in SHAPES] == [True, False, True]
    config = OptimizerConfig(learning_rate=1.0, no_decay=["q_proj"])
    assert [config.decays(name, norms) for name in SHAPES] == [False, False, True]


def test_a_step_clips_to_the_global_norm_like_torch():
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((4, 3)).astype(np.float32), np.zeros(4, np.float32)
    x, y = rng.standard_normal((6, 3)).astype(np.float32), 50 * rng.standard_normal((6, 4)).astype(np.float32)
    step = TrainStep(Affine(weight, bias), OptimizerConfig(learning_rate=0.1, eps=0.5, max_grad_norm=1.0))
    loss, norm, _, _ = step(Tensor(0.1, ms.float32), Tensor(x), Tensor(y))
    twins = [torch.nn.Parameter(torch.tensor(value)) for value in (weight, bias)]
    reference = torch.optim.AdamW(twins, lr=0.1, eps=0.5, weight_decay=0.0)
    expected_loss = ((torch.tensor(x) @ twins[0].T + twins[1] - torch.tensor(y)) ** 2).mean()
    expected_loss.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
    reference.step()
    assert float(loss) == pytest.approx(expected_loss.item(), rel=1e-5)
    assert float(norm) == pytest.approx(expected_norm.item(), rel=1e-5)
    for parameter, twin in zip(step.optimizer.parameters, twins, strict=True):
        np.testing.assert_allclose(parameter.asnumpy(), twin.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_impossible_betas_are_refused():
    with pytest.raises(UserError, match="betas"):
        OptimizerConfig(learning_rate=1e-3, betas=[0.9, 1.0])


@pytest.mark.parametrize("key", ["learning_rate", "eps", "weight_decay", "beta2_power", "max_grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        OptimizerConfig(**{"learning_rate": 1e-3, key: value})
