"""The benchmark: its workload, its sums, a whole run on tiny sizes, and what bad settings get."""

import json
import subprocess
import sys

import pytest
from mindspore import nn

from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.tools import benchmark
from mindvlm.tools.benchmarks import inference
from mindvlm.tools.benchmarks.mindvlm_peer import Inference
from mindvlm.tools.benchmarks.worker import PEERS, InferencePeer, PeerEntry
from mindvlm.tools.benchmarks.workload import Workload


def make_workload(name: str, *, num_tokens: int) -> Workload:
    model = benchmark.MODELS[name]
    return model.workload(model.config(), seed=0, num_tokens=num_tokens)


@pytest.fixture
def workload() -> Workload:
    return make_workload("smoke", num_tokens=8)


def result(*, vision: float, prefill: float, decode: float, ids: list[int], logits: list[float]) -> dict:
    seconds = {"load": 1.0, "compile": 2.0, "vision": vision, "prefill": prefill, "decode": decode}
    return {
        "seconds": seconds,
        "values": {"prefill": logits, "decode": ids},
        "peak_bytes": dict.fromkeys(seconds, 2**30),
        "copy_bandwidth": 2e10,
        "description": "made up",
    }


def test_the_released_workload_is_the_canonical_prompt_and_size():
    workload = make_workload("vary_toy", num_tokens=64)
    ids = workload.prompt_ids[0].tolist()
    assert len(ids) == 292
    assert (ids.index(151857), ids.index(151858), ids.count(151859)) == (20, 277, 256)
    assert workload.parameter_bytes == 4 * 2_237_365_504
    # The language model without its embedding table, and 324 of 356 cached slots of 24 layers, keys and values.
    assert workload.decode_bytes == 4 * (1_836_517_376 - 311_009_280 + 2 * 24 * 2048 * 324)
    assert [branch.shape for branch in workload.pixels] == [(1, 3, 224, 224), (1, 3, 1024, 1024)]


def test_the_workload_of_tinyllava_is_its_prompt_and_size():
    workload = make_workload("tinyllava_1_5b", num_tokens=64)
    ids = workload.prompt_ids[0].tolist()
    assert len(ids) == 778 and ids.count(-200) == 729 and ids.index(-200) == 35
    assert max(ids) < 32_000 and workload.placeholder_id == -200
    assert workload.parameter_bytes == 4 * 1_504_353_824
    # The decoder without its embedding table, and 810 of 842 cached slots of 22 layers, keys and values of 4 heads.
    assert workload.decode_bytes == 4 * (1_100_048_384 - 65_536_000 + 2 * 22 * 256 * 810)
    assert [pixels.shape for pixels in workload.pixels] == [(1, 3, 384, 384)]


def test_summary_and_comparison_of_known_figures(workload):
    results = {
        "mindvlm": [
            result(vision=1.0, prefill=1.0, decode=2.0, ids=[1, 2, 3], logits=[3.0, 4.0]),
            result(vision=3.0, prefill=1.0, decode=4.0, ids=[1, 2, 3], logits=[3.0, 4.0]),
        ],
        "torch": [
            result(vision=5.0, prefill=1.0, decode=6.0, ids=[1, 2, 9], logits=[3.0, 5.0]),
            result(vision=7.0, prefill=1.0, decode=6.0, ids=[1, 2, 9], logits=[3.0, 5.0]),
        ],
    }
    summary = inference.summarize(results, workload)
    assert summary["mindvlm"]["vision_s"] == 2.0
    assert summary["mindvlm"]["vision_prefill_s"] == 3.0
    assert summary["mindvlm"]["decode_tokens_per_s"] == pytest.approx((8 / 2 + 8 / 4) / 2)
    assert summary["mindvlm"]["decode_gb_per_s"] == pytest.approx(3 * workload.decode_bytes / 1e9)
    assert summary["mindvlm"]["copy_gb_per_s"] == 20
    assert summary["torch"]["peak_over_parameters"] == pytest.approx(2**30 / workload.parameter_bytes)
    comparison = inference.compare(results, summary)["torch"]
    assert comparison["decode_speedup"] == pytest.approx(3 / (8 / 6))
    assert comparison["vision_prefill_speedup"] == pytest.approx(7 / 3)
    assert comparison["logits_relative_error"] == pytest.approx(1 / 34**0.5)
    assert comparison["equal_tokens"] == 2


def test_copy_bandwidth_is_that_of_a_computer():
    assert 1e8 < inference.copy_bandwidth(1) < 1e13


def test_the_process_that_starts_the_peers_holds_no_framework():
    code = "import sys, mindvlm.tools.benchmark; print([m for m in ('torch', 'mindspore') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_torch_peer_runs_without_mindspore():
    code = "import sys, mindvlm.tools.benchmarks.torch_peer; print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("model", ["smoke", "tinyllava_smoke"])
def test_both_frameworks_agree_on_a_whole_run(tmp_path, capsys, model):
    path = tmp_path / "figures.json"
    arguments = ["--model", model, "--against", "torch", "--rounds", "1", "--tokens", "8", "--json", str(path)]
    assert benchmark.main([*arguments, "--threads", "1"]) == 0
    output = capsys.readouterr().out
    assert "decode_tokens_per_s" in output and "first 8 of 8 tokens equal" in output
    report = json.loads(path.read_text())
    assert list(report["summary"]) == ["mindvlm", "torch"]
    assert report["comparison"]["torch"]["equal_tokens"] == 8
    assert report["comparison"]["torch"]["logits_relative_error"] < 1e-5
    for rounds in report["rounds"].values():
        assert list(rounds[0]["seconds"]) == list(InferencePeer.PHASES)
        assert all(seconds > 0 for seconds in rounds[0]["seconds"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (
            ["--train", "--model", "tinyllava_1_5b"],
            "tinyllava_1_5b: has no training benchmark; give vary_toy or smoke",
        ),
        (["--tokens", "-3"], "--tokens -3: must be at least 1"),
        (["--json", "no/such/folder/figures.json"], "does not exist"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(arguments, message, capsys):
    assert benchmark.main(["--model", "smoke", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_machine_that_cannot_run_it_is_told_so(workload, monkeypatch):
    monkeypatch.setitem(PEERS, "absent", PeerEntry("nowhere", "no_such_framework"))
    with pytest.raises(UserError, match="pip install no_such_framework"):
        inference.check_machine(workload, ["absent"])
    monkeypatch.setattr(inference, "free_host_memory", lambda: 1000)
    with pytest.raises(UserError, match="end other programs"):
        inference.check_machine(workload, ["mindvlm"])


def test_a_peer_that_dies_is_named(workload, monkeypatch, capfd):
    monkeypatch.setitem(PEERS, "absent", PeerEntry("nowhere", "numpy"))
    with pytest.raises(UserError, match="peer absent ended with status 1"):
        inference.run_peer("absent", workload, num_threads=1)
    assert "absent" in capfd.readouterr().err


# prompt and answer pass the 128 slots that the prompt alone takes
@pytest.mark.parametrize(("model", "num_tokens"), [("tinyllava_smoke", 64), ("smoke", 80)])
def test_nothing_is_compiled_in_the_measured_stages(monkeypatch, model, num_tokens):
    """Counts the graphs that would be compiled, and runs them in PyNative mode."""
    monkeypatch.setattr(runtime, "set_mode", lambda graph_mode, set_mode=runtime.set_mode: set_mode(False))
    monkeypatch.setattr(nn.Cell, "compile", lambda cell, *inputs: None)
    workload = make_workload(model, num_tokens=num_tokens)
    peer, num_compiled = Inference(workload, num_threads=1), {}
    for phase in peer.PHASES:
        getattr(peer, phase)()
        num_compiled[phase] = len(peer.engine.runner.compiled)
    assert num_compiled["load"] == 0 < num_compiled["compile"]
    assert {num_compiled[phase] for phase in peer.PHASES[1:]} == {num_compiled["compile"]}
    assert peer.engine.capacity == 256 and workload.prompt_ids.shape[1] <= 128
