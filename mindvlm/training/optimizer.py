"""AdamW with torch's formula (Loshchilov and Hutter, arXiv 1711.05101), on the backend's fused Adam kernel."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindvlm.core.errors import UserError
from mindvlm.parallel.zero import scheduled_beta2


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and clipping.

    Attributes:
        beta2_power: lets the second beta rise with the updates, see `scheduled_beta2`; 0 keeps it constant.
        no_decay: regular expressions; parameters whose name matches one have no weight decay. null uses the original's
            exceptions: biases and the parameters of LayerNorm (RMSNorm weights decay).
        learning_rate_factors: regular expression -> factor of the learning rate of matching parameters; the first
            match applies. Each must match a parameter that trains.
        max_grad_norm: gradients are scaled down to this total norm; null does not clip.
    """

    learning_rate: float
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    beta2_power: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    max_grad_norm: float | None = 1.0
    no_decay: list[str] | None = None
    learning_rate_factors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}; expected two numbers from 0 to below 1")
        # NaN is in no range
        if not (0 < self.learning_rate < math.inf and 0 < self.eps < math.inf and 0 <= self.weight_decay < math.inf):
            raise UserError("optimizer: learning_rate and eps must be above 0, weight_decay at least 0")
        if not 0 <= self.beta2_power < math.inf:
            raise UserError(f"optimizer.beta2_power is {self.beta2_power}; expected at least 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"optimizer.max_grad_norm is {self.max_grad_norm}; expected a number above 0, or null")
        check_patterns("optimizer.no_decay", self.no_decay or ())
        check_patterns("optimizer.learning_rate_factors", self.learning_rate_factors)
        for pattern, factor in self.learning_rate_factors.items():
            if factor < 0:
                raise UserError(f"optimizer.learning_rate_factors: {pattern!r} has {factor}; expected at least 0")

    def learning_rate_factor(self, name: str) -> float:
        """Returns the learning rate factor of a parameter."""
        factors = self.learning_rate_factors
        return next((factor for pattern, factor in factors.items() if re.search(pattern, name)), 1.0)

    def decays(self, name: str, layer_norms: frozenset[str] = frozenset()) -> bool:
        """Returns whether a parameter has weight decay.

        Args:
            layer_norms: names of the parameters of LayerNorm, used if `no_decay` is null.
        """
        if self.no_decay is None:
            return "bias" not in name and name not in layer_norms
        return not any(re.search(pattern, name) for pattern in self.no_decay)


def check_patterns(key: str, patterns) -> None:
    """Raises UserError unless all patterns are valid regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression ({error}); correct it") from None


update_parameter = ops.MultitypeFuncGraph("update_parameter")


@update_parameter.register(
    "Function", "Tuple", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Number", "Bool", "Bool"
)
def _update_parameter(adam, shared, parameter, master, moment1, moment2, gradient, factor, decays, is_float32):
    """Updates one parameter, or its master copy if it has one; `factor` scales its learning rate."""
    beta1, beta2, beta1_power, beta2_power, eps, learning_rate, weight_decay, scale = shared
    rate = learning_rate * factor
    gradient = gradient.astype(ms.float32) * scale
    if decays:
        kept = ops.depend(master, gradient) * (1.0 - rate * weight_decay)
        gradient = ops.depend(gradient, ops.assign(master, kept))
    done = adam(master, moment1, moment2, beta1_power, beta2_power, rate, beta1, beta2, eps, gradient)
    if not is_float32:
        done = ops.assign(parameter, ops.depend(master, done).astype(parameter.dtype))
    return done


class AdamW(nn.Cell):
    """Updates `parameters` in place: p *= 1 - lr * weight_decay, then Adam with bias correction.

    The kernel computes p -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + e); torch's p -= lr/(1-b1^t) m / (sqrt(v/(1-b2^t))
    + eps) is the same with e = eps sqrt(1-b2^t). 16-bit parameters have a float32 master copy, which is
    updated instead; `fill_masters` fills it.

    Args:
        parameters: the parameters to update.
        config: betas, eps, decay and its exceptions.
        layer_norms: names of the parameters of LayerNorm, see `OptimizerConfig.decays`.
    """

    def __init__(
        self, parameters: Sequence[Parameter], config: OptimizerConfig, *, layer_norms: frozenset[str] = frozenset()
    ):
        super().__init__(auto_prefix=False)
        self.parameters = ms.ParameterTuple(parameters)
        self.moment1 = ms.ParameterTuple([float_state(p, "moment1") for p in parameters])
        self.moment2 = ms.ParameterTuple([float_state(p, "moment2") for p in parameters])
        self.is_float32 = tuple(p.dtype == ms.float32 for p in parameters)
        masters = [p if p.dtype == ms.float32 else float_state(p, "master") for p in parameters]
        self.updated = ms.ParameterTuple(masters)
        self.num_updates = Parameter(Tensor(0, ms.float32), name="num_updates", requires_grad=False)
        self.decays = tuple(config.weight_decay > 0 and config.decays(p.name, layer_norms) for p in parameters)
        self.factors = tuple(config.learning_rate_factor(p.name) for p in parameters)
        self.weight_decay = config.weight_decay
        self.eps = config.eps
        self.bias_correction = config.bias_correction
        self.beta1 = Tensor(config.betas[0], ms.float32)
        self.beta2 = Tensor(config.betas[1], ms.float32)
        self.beta2_power = config.beta2_power
        self.adam = ops.Adam()
        # compiles ten times faster than a loop
        self.for_all = ops.HyperMap()

    def construct(self, gradients, learning_rate, scale=1.0):
        """Runs one update.

        Args:
            gradients: in the order of the parameters.
            learning_rate: float32 scalar.
            scale: factor of the gradients.
        """
        count = self.num_updates + 1.0
        beta1_power = ops.pow(self.beta1, count)
        beta2 = scheduled_beta2(self.beta2, self.beta2_power, self.num_updates)
        beta2_power = ops.pow(beta2, count)
        if not self.bias_correction:
            beta1_power, beta2_power = ops.zeros_like(beta1_power), ops.zeros_like(beta2_power)
        eps = self.eps * ops.sqrt(1.0 - beta2_power)
        shared = (self.beta1, beta2, beta1_power, beta2_power, eps, learning_rate, self.weight_decay, scale)
        updated = self.for_all(
            ops.Partial()(update_parameter, self.adam, shared),
            self.parameters,
            self.updated,
            self.moment1,
            self.moment2,
            gradients,
            self.factors,
            self.decays,
            self.is_float32,
        )
        return ops.assign(self.num_updates, ops.depend(count, updated))

    @property
    def masters(self) -> list[tuple[Parameter, Parameter]]:
        """Pairs of each 16-bit parameter and its float32 copy."""
        pairs = zip(self.parameters, self.updated, strict=True)
        return [(parameter, master) for parameter, master in pairs if parameter is not master]

    def fill_masters(self) -> None:
        """Copies the filled parameters to their master copies."""
        for parameter, master in self.masters:
            master.set_data(parameter.astype(ms.float32))

    @property
    def state(self) -> dict[str, Parameter]:
        """The state in a checkpoint besides the parameters, by name.

        Fill it before the first update: a compiled graph ignores `set_data` of a Parameter that it filled with zeros.
        """
        kept = (*self.moment1, *self.moment2, *(master for _, master in self.masters), self.num_updates)
        return {parameter.name: parameter for parameter in kept}


def float_state(parameter: Parameter, kind: str) -> Parameter:
    """Returns a float32 Parameter of zeros with the shape of another one, named after it."""
    zeros = initializer("zeros", parameter.shape, ms.float32)
    return Parameter(zeros, name=f"{kind}.{parameter.name}", requires_grad=False)
