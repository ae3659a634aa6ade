"""The training benchmark: its batch, its arithmetic, a small run of both frameworks and of two processes."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from mindspore import nn

from mindvlm.core.errors import UserError
from mindvlm.nn.config import RopeScaling
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.tools import benchmark
from mindvlm.tools.benchmarks import mindvlm_peer, scaling, training
from mindvlm.tools.benchmarks.vary import small_training, smoke_training


def prepared(steps: list[tuple[float, float]]) -> dict:
    """A contender's result of (seconds, loss), with warm-up steps that count for nothing."""
    answers = [{"seconds": s, "processor_seconds": 2 * s, "peak_bytes": 2**30, "value": v} for s, v in steps]
    return {"compile": {"seconds": 7.0}, "steps": answers}


def test_the_batch_is_four_rows_of_512_for_50_million_parameters():
    workload = small_training(seed=0)
    assert (workload.batch_size, workload.length, workload.tokens_per_step) == (4, 512, 2048)
    assert workload.num_parameters == pytest.approx(50e6, rel=0.05)
    ids, labels = workload.input_ids, workload.labels
    assert ids.shape == labels.shape == (4, 512) and ids.max() < workload.config["vocab_size"]
    counted = labels != -100
    assert (labels[counted] == ids[counted]).all() and not counted[:, :292].any() and counted[:, 292:].all()
    assert len({row.tobytes() for row in ids}) == 4
    deeper = small_training(seed=0, num_layers=24)
    assert deeper.num_parameters > workload.num_parameters


def test_the_frequencies_are_those_of_the_trainer(monkeypatch):
    """Of a decoder that rotates half of each head, with scaled frequencies."""
    peer, made = mindvlm_peer.Training.__new__(mindvlm_peer.Training), []
    workload = smoke_training(seed=0)
    config = workload.model_config
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    decoder = dataclasses.replace(config.language_model, partial_rotary_factor=0.5, rope_scaling=scaling)
    monkeypatch.setattr(config, "language_model", decoder)
    monkeypatch.setattr(type(workload), "model_config", config)
    monkeypatch.setattr(mindvlm_peer, "build_model", lambda *arguments: nn.Cell())
    monkeypatch.setattr(mindvlm_peer, "TrainStep", lambda *arguments, **options: made.append(arguments))
    peer.workload, peer.parallel, peer.mesh, peer.context = workload, None, None, None
    peer.load()
    expected = inverse_frequencies(decoder.head_dim // 2, decoder.rope_theta, scaling=scaling)
    np.testing.assert_array_equal(peer.arguments[3].asnumpy(), expected)


def test_summary_and_comparison_of_known_figures():
    workload = smoke_training(seed=0)
    warm_up = [(100.0, 1.0)] * training.NUM_WARM_UP_STEPS
    results = {
        "mindvlm": prepared([*warm_up, (1.0, 4.0), (3.0, 2.0), (2.0, 1.0)]),
        "torch": prepared([*warm_up, (4.0, 4.0), (4.0, 2.5), (8.0, 1.0)]),
    }
    summary = training.summarize(results, workload)
    assert summary["mindvlm"]["step_s"] == 2.0 and summary["mindvlm"]["fastest_step_s"] == 1.0
    assert summary["mindvlm"]["tokens_per_s"] == workload.tokens_per_step / 2.0
    assert summary["mindvlm"]["compile_s"] == 7.0 and summary["mindvlm"]["peak_gib"] == 1.0
    comparison = training.compare(results, summary)["torch"]
    assert (comparison["step_ratio"], comparison["fastest_step_ratio"], comparison["peak_ratio"]) == (0.5, 0.25, 1.0)
    assert comparison["loss_relative_difference"] == pytest.approx(0.2)


def test_scaling_is_that_of_tokens_over_the_first_layout(monkeypatch):
    workload = smoke_training(seed=0)
    seconds = {(1, 2): 2.0, (2, 2): 2.5, (1, 4): 1.6}

    def run(_, processes, *, num_threads, num_steps):
        steps = [{"seconds": seconds[processes, num_threads], "value": 1.0}] * (num_steps - 1)
        return [{"seconds": 50.0, "value": 1.0}, *steps]

    monkeypatch.setattr(scaling, "run_processes", run)
    figures = scaling.scaling(workload, num_processes=2, num_threads=4, num_steps=3, num_warm_up=1)
    assert [(one["processes"], one["threads"], one["step_s"]) for one in figures.values()] == [
        (1, 2, 2.0),
        (2, 2, 2.5),
        (1, 4, 1.6),
    ]
    lines = scaling.describe(figures)
    assert [line.rsplit(", ", 1)[1] for line in lines] == ["1.00x", "1.60x", "1.25x"]


def test_the_process_that_starts_the_others_holds_no_framework():
    code = "import sys, mindvlm.tools.benchmarks.scaling; print({'torch', 'mindspore'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_both_frameworks_take_the_same_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "DEEP_LAYERS", 1)
    path = tmp_path / "figures.json"
    arguments = ["--train", "--model", "smoke", "--against", "torch", "--steps", "1", "--threads", "1"]
    assert benchmark.main([*arguments, "--processes", "1", "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "against torch: step" in output and "1 decoder layers compiled in" in output and "processes" not in output
    report = json.loads(path.read_text())
    assert report["comparison"]["torch"]["loss_relative_difference"] < 1e-5
    losses = [step["value"] for step in report["peers"]["mindvlm"]["steps"]]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


@pytest.mark.ci
def test_two_processes_take_the_steps_of_one():
    workload = smoke_training(seed=0, num_layers=1)
    one, two = (scaling.run_processes(workload, num_processes, num_threads=1, num_steps=2) for num_processes in (1, 2))
    assert [step["value"] for step in two] == pytest.approx([step["value"] for step in one], rel=1e-5)
    assert one[0]["value"] != one[1]["value"]


def test_processes_that_fail_are_told(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(scaling, "__file__", str(tmp_path / "absent.py"))
    with pytest.raises(UserError, match="1 training processes ended with status 2"):
        scaling.run_processes(smoke_training(seed=0), 1, num_threads=1, num_steps=1)
    assert "absent.py" in capfd.readouterr().err


def test_no_processes_are_refused(capsys):
    assert benchmark.main(["--train", "--model", "smoke", "--processes", "0"]) == 2
    assert "--processes 0: must be at least 1" in capsys.readouterr().err
