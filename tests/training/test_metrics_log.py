import json
import sys

import pytest

from mindvlm.core.errors import UserError
from mindvlm.training.metrics_log import MetricsLog, drop_after, read_metrics


def test_records_keep_all_digits_and_later_ones_are_dropped_on_resume(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    values = [0.1 + 0.2, 1 / 3, float("inf"), 5.123456789012345]
    for step, value in enumerate(values, start=1):
        log.write(step, loss=value)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == values
    resumed = MetricsLog(tmp_path, step=2)
    resumed.write(3, loss=7.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": values[0]},
        {"step": 2, "loss": values[1]},
        {"step": 3, "loss": 7.0},
    ]


def test_half_a_surrogate_pair_does_not_stop_a_run_that_goes_on(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "text": "\ud83d"}) + "\n")
    drop_after(path, 3)
    assert read_metrics(path)[0]["text"] in ("\ud83d", "\\ud83d")


@pytest.mark.parametrize("text", ["nonsense\n{}\n", '{"loss": 1}\n\n{"step": 1}\n', "[1]\n \n"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="line 1"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist; give the output_dir of a run"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_without_a_package_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        MetricsLog(tmp_path, step=0, tensorboard=True)


def test_event_files_hold_the_figures(tmp_path):
    log = MetricsLog(tmp_path, step=0, tensorboard=True)
    log.write(7, loss=1.5, note="text is left out")
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data = path.read_bytes()
    assert b"loss" in data and b"note" not in data
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 7,
        "loss": 1.5,
        "note": "text is left out",
    }
