"""The loss scale: how it moves, and where it ends."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.core.errors import UserError
from mindvlm.training.loss import MIN_SCALE, LossScale, LossScaleConfig
from mindvlm.training.step import StepResult
from mindvlm.training.step_runner import StepRunner


def move(scale: LossScale, finite: list[bool]) -> list[float]:
    values = []
    for is_finite in finite:
        scale(Tensor(is_finite))
        values.append(scale.value.asnumpy().item())
    return values


def test_it_is_halved_by_an_overflow_and_doubled_after_a_while():
    scale = LossScale(LossScaleConfig(initial=8.0, growth_interval=2))
    assert move(scale, [True, False, True, True, True, False]) == [8.0, 4.0, 4.0, 8.0, 8.0, 4.0]
    assert scale.num_skipped.asnumpy() == 2


def test_single_overflows_are_tolerated_until_it_grows():
    scale = LossScale(LossScaleConfig(initial=8.0, growth_interval=2, hysteresis=2))
    # the second overflow since the start lowers it, and so does each one until it grows
    assert move(scale, [False, True, False, False]) == [8.0, 8.0, 4.0, 2.0]
    assert move(scale, [True, True, False, True, False]) == [2.0, 4.0, 4.0, 4.0, 2.0]
    assert "loss_scale.num_tolerated" in scale.state
    assert len(LossScale(LossScaleConfig()).state) == 3, "checkpoints of other runs stay readable"


def test_its_limits_can_be_chosen():
    scale = LossScale(LossScaleConfig(initial=4.0, growth_interval=1, minimum=2.0, maximum=8.0))
    assert move(scale, [False, False, True, True, True]) == [2.0, 2.0, 4.0, 8.0, 8.0]


def test_it_has_an_end():
    scale = LossScale(LossScaleConfig(initial=1.0))
    assert move(scale, [False] * 20)[-1] == MIN_SCALE


@pytest.mark.parametrize(("value", "is_overflow"), [(2.0, True), (MIN_SCALE, False)])
def test_an_overflow_at_its_end_is_as_bad_as_a_loss_that_is_not_finite(value, is_overflow):
    class Step:
        loss_scale = LossScale(LossScaleConfig(initial=4.0))

    runner = object.__new__(StepRunner)
    runner.step, runner.has_loss_scale, runner.loss_terms = Step(), True, ()
    runner.step.loss_scale.value.set_data(Tensor(value, ms.float32))
    result = StepResult(*(Tensor(np.array(one)) for one in (1.0, np.inf, 3.0, False)))
    outcome = runner.outcome(result)
    assert (outcome.is_finite, outcome.is_overflow) == (False, is_overflow)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"hysteresis": 0}, "hysteresis is 0"), ({"minimum": 2.0**17}, "minimum is 131072.0, initial")],
)
def test_impossible_limits_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        LossScaleConfig(**values)


def test_impossible_values_are_refused():
    with pytest.raises(UserError, match="loss_scale: initial is 0.5"):
        LossScaleConfig(initial=0.5)
