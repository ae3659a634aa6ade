import math

import pytest

from mindvlm.core.errors import UserError
from mindvlm.training.schedule import ScheduleConfig


def test_warm_up_plateau_and_descent():
    schedule = ScheduleConfig(total_steps=100, warmup_steps=10, decay_steps=40, final_ratio=0.1)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[60] == 1.0
    assert factors[80] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert all(earlier >= later for earlier, later in zip(factors[60:], factors[61:], strict=False))


def test_without_a_plateau_the_descent_begins_after_the_warm_up():
    cosine = ScheduleConfig(total_steps=110, warmup_steps=10)
    linear = ScheduleConfig(total_steps=110, warmup_steps=10, decay="linear", final_ratio=0.2)
    constant = ScheduleConfig(total_steps=110, warmup_steps=10, decay="constant")
    for step in (10, 35, 60, 109):
        progress = (step - 10) / 100
        assert cosine.factor(step) == pytest.approx(0.5 * (1 + math.cos(math.pi * progress)))
        assert linear.factor(step) == pytest.approx(1 - 0.8 * progress)
        assert constant.factor(step) == 1.0
    assert cosine.factor(0) == linear.factor(0) == constant.factor(0) == 0.1


def test_a_warm_up_from_zero_is_that_of_transformers():
    schedule = ScheduleConfig(total_steps=10, warmup_steps=4, warmup_from_zero=True)
    assert [schedule.factor(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    others = ScheduleConfig(total_steps=10, warmup_steps=4)
    assert [schedule.factor(step) for step in range(4, 10)] == [others.factor(step) for step in range(4, 10)]


def test_length_in_epochs():
    schedule = ScheduleConfig(epochs=1.5, warmup_ratio=0.1).resolved(rows_per_epoch=100, rows_per_step=8)
    assert (schedule.total_steps, schedule.num_warmup_steps) == (19, 2)
    assert schedule.resolved(rows_per_epoch=None, rows_per_step=8) == schedule
    with pytest.raises(UserError, match="no end"):
        ScheduleConfig(epochs=1).resolved(rows_per_epoch=None, rows_per_step=8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(total_steps=10, warmup_steps=6, decay_steps=6), "exceed total_steps"),
        (dict(), "total_steps and epochs"),
        (dict(total_steps=1, epochs=1), "total_steps and epochs"),
        (dict(total_steps=0), "total_steps is 0"),
        (dict(epochs=0.0), "epochs is 0"),
        (dict(total_steps=9, warmup_steps=1, warmup_ratio=0.1), "warmup_steps and warmup_ratio"),
        (dict(total_steps=9, warmup_ratio=1.5), "warmup_ratio is 1.5"),
        (dict(total_steps=9, final_ratio=-1.0), "final_ratio is -1"),
        (dict(total_steps=900, decay="constant", decay_steps=5), "no effect"),
        (dict(total_steps=9, idle_steps=-1), "idle_steps is -1"),
        (dict(total_steps=9, idle_steps=5, warmup_steps=5), "idle_steps 5 and warmup_steps 5 and decay_steps 0 exceed"),
    ],
)
def test_impossible_schedules_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**values)
