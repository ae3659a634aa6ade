"""AdamW as torch computes it (Loshchilov and Hutter, arXiv 1711.05101), on the backend's fused Adam kernel."""

import re
from dataclasses import dataclass, field

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.errors import UserError

NO_DECAY = [r"\.bias$", r"norm[^.]*\.weight$", r"layrnorm\.weight$", r"neck\.[13]\.weight$"]
"""Patterns of the parameters without weight decay: biases and the weights of normalisations."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and clipping. `no_decay` holds regular expressions that are searched in parameter names."""

    learning_rate: float
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    max_grad_norm: float = 1.0
    no_decay: list[str] = field(default_factory=lambda: list(NO_DECAY))

    def __post_init__(self):
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}; expected two numbers from 0 to below 1")
        if self.learning_rate <= 0 or self.eps <= 0 or self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise UserError("optimizer: learning_rate, eps and max_grad_norm must be above 0, weight_decay at least 0")

    def decays(self, name: str) -> bool:
        """Whether the parameter of that name is in the group with weight decay."""
        return not any(re.search(pattern, name) for pattern in self.no_decay)


class AdamW(nn.Cell):
    """Updates `parameters` in place: p *= 1 - lr * weight_decay, then Adam with bias correction.

    The kernel computes p -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + e); torch's p -= lr/(1-b1^t) m / (sqrt(v/(1-b2^t))
    + eps) is the same with e = eps sqrt(1-b2^t).

    Args:
        parameters: what to update.
        config: betas, eps, decay and its exceptions.
    """

    def __init__(self, parameters: list[Parameter], config: OptimizerConfig):
        super().__init__(auto_prefix=False)
        self.parameters = ms.ParameterTuple(parameters)
        self.moment1 = ms.ParameterTuple([moment(p, "moment1") for p in parameters])
        self.moment2 = ms.ParameterTuple([moment(p, "moment2") for p in parameters])
        self.num_updates = Parameter(Tensor(0, ms.float32), name="num_updates", requires_grad=False)
        self.decays = tuple(config.weight_decay > 0 and config.decays(p.name) for p in parameters)
        self.weight_decay = config.weight_decay
        self.eps = config.eps
        self.bias_correction = config.bias_correction
        self.beta1 = Tensor(config.betas[0], ms.float32)
        self.beta2 = Tensor(config.betas[1], ms.float32)
        self.adam = ops.Adam()

    def construct(self, gradients, learning_rate):
        """One update; gradients in the order of the parameters, learning_rate a float32 scalar Tensor."""
        count = self.num_updates + 1.0
        beta1_power = ops.pow(self.beta1, count)
        beta2_power = ops.pow(self.beta2, count)
        if not self.bias_correction:
            beta1_power, beta2_power = ops.zeros_like(beta1_power), ops.zeros_like(beta2_power)
        eps = self.eps * ops.sqrt(1.0 - beta2_power)
        keep = 1.0 - learning_rate * self.weight_decay
        done = count
        for i in range(len(self.parameters)):
            parameter = self.parameters[i]
            if self.decays[i]:
                done = ops.depend(done, ops.assign(parameter, parameter * keep))
            gradient = ops.depend(gradients[i], done)
            updated = self.adam(
                parameter,
                self.moment1[i],
                self.moment2[i],
                beta1_power,
                beta2_power,
                learning_rate,
                self.beta1,
                self.beta2,
                eps,
                gradient,
            )
            done = ops.depend(done, updated)
        return ops.assign(self.num_updates, done)


def moment(parameter: Parameter, kind: str) -> Parameter:
    """A zero Parameter of the same shape, named after the other one."""
    zeros = initializer("zeros", parameter.shape, ms.float32)
    return Parameter(zeros, name=f"{kind}.{parameter.name}", requires_grad=False)
