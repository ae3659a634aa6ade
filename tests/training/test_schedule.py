import pytest

from mindvlm.errors import UserError
from mindvlm.training.schedule import ScheduleConfig


def test_warm_up_plateau_and_descent():
    schedule = ScheduleConfig(total_steps=100, warmup_steps=10, decay_steps=40, final_ratio=0.1)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[60] == 1.0
    assert factors[80] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert all(earlier >= later for earlier, later in zip(factors[60:], factors[61:], strict=False))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="exceed total_steps"):
        ScheduleConfig(total_steps=10, warmup_steps=6, decay_steps=6)
