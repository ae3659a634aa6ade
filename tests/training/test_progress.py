import pytest

from mindvlm.training.metrics_log import Progress, duration


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_speed_leaves_out_steps_that_compiled():
    clock = Clock()
    progress = Progress(10, clock=clock)
    for seconds, is_counted in ((30.0, False), (2.0, True), (4.0, True)):
        progress.start_step()
        clock.now += seconds
        assert progress.end_step(90, is_counted=is_counted) == seconds
        clock.now += 100
    assert progress.speed == {"tokens_per_second": 30.0, "seconds_per_step": 3.0}
    line = progress.line(3, {"loss": 1.23456, "learning_rate": 1e-3, **progress.speed, "skipped": 2})
    assert line == "step 3/10 | loss 1.2346 | lr 1.00e-03 | 30 tokens/s | 3 s a step | 2 samples skipped | 0:00:21 left"
    progress.restart()
    assert progress.speed == {} and progress.line(10, {"loss": 1.0}) == "step 10/10 | loss 1.0000"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (3723, "1:02:03"), (2 * 86400 + 61, "2 d 0:01:01"), (59.6, "0:01:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
