"""The benchmark: its workload and files, its sums, whole runs on tiny sizes, and what bad settings get."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from mindspore import nn

from mindvlm.checkpoint import open_checkpoint
from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.tools import benchmark
from mindvlm.tools.benchmarks import growth, inference, machine
from mindvlm.tools.benchmarks.mindvlm_peer import Inference
from mindvlm.tools.benchmarks.worker import PEERS, Contender, InferencePeer, PeerEntry, parse_contenders
from mindvlm.tools.benchmarks.workload import Workload


def make_workload(name: str, *, num_tokens: int) -> Workload:
    model = benchmark.MODELS[name]
    return model.workload(model.config(), seed=0, num_tokens=num_tokens)


@pytest.fixture
def workload() -> Workload:
    return make_workload("smoke", num_tokens=8)


def result(*, prefill: float, decode: float, ids: list[int], logits: list[float], vision: float | None = None) -> dict:
    seconds = {"load": 1.0, "compile": 2.0, "vision": vision, "prefill": prefill, "decode": decode}
    seconds = {phase: duration for phase, duration in seconds.items() if duration is not None}
    return {
        "seconds": seconds,
        "values": {"prefill": logits, "decode": ids},
        "peak_bytes": dict.fromkeys(seconds, 2**30),
        "text": "made up",
        "stored_bytes": 2**29,
        "decode_bytes": 10**9,
    }


def test_the_released_workload_is_the_canonical_prompt_and_size():
    workload = make_workload("vary_toy", num_tokens=64)
    ids = workload.prompt_ids[0].tolist()
    assert len(ids) == 292
    assert (ids.index(151857), ids.index(151858), ids.count(151859)) == (20, 277, 256)
    assert workload.num_parameters == 2_237_365_504
    assert [branch.shape for branch in workload.pixels] == [(1, 3, 224, 224), (1, 3, 1024, 1024)]


def test_the_workload_of_tinyllava_is_its_prompt_and_size():
    workload = make_workload("tinyllava_1_5b", num_tokens=64)
    ids = workload.prompt_ids[0].tolist()
    assert len(ids) == 778 and ids.count(-200) == 729 and ids.index(-200) == 35
    assert max(ids) < 32_000 and workload.placeholder_id == -200
    assert workload.num_parameters == 1_504_353_824
    assert [pixels.shape for pixels in workload.pixels] == [(1, 3, 384, 384)]


def test_summary_and_comparison_of_known_figures():
    results = {
        "machine": [{"read_gb_per_s": 20.0, "gemm_gflops": 100.0}, {"read_gb_per_s": 10.0, "gemm_gflops": 100.0}],
        "mindvlm:int8": [
            result(vision=1.0, prefill=1.0, decode=2.0, ids=[1, 2, 3], logits=[3.0, 4.0]),
            result(vision=3.0, prefill=1.0, decode=4.0, ids=[1, 2, 3], logits=[3.0, 4.0]),
        ],
        "torch:float32": [
            result(vision=5.0, prefill=1.0, decode=6.0, ids=[1, 2, 9], logits=[3.0, 5.0]),
            result(vision=7.0, prefill=1.0, decode=6.0, ids=[1, 2, 9], logits=[3.0, 5.0]),
        ],
        "llamacpp:q8_0": [result(prefill=2.0, decode=4.0, ids=[1, 2, 3], logits=[])] * 2,
    }
    summary = inference.summarize(results, num_tokens=8)
    assert summary["mindvlm:int8"]["vision_s"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert summary["machine"]["read_gb_per_s"]["median"] == 15.0
    figures = inference.medians(summary)
    ours, torch, llamacpp = (figures[name] for name in list(results)[1:])
    assert ours["decode_tokens_per_s"] == pytest.approx((8 / 2 + 8 / 4) / 2)
    assert ours["decode_gb_per_s"] == pytest.approx(3.0)
    assert ours["of_read_bandwidth"] == pytest.approx((4 / 20 + 2 / 10) / 2)
    assert ours["page_s"] == pytest.approx((2 + 719 / 4 + 4 + 719 / 2) / 2)
    assert llamacpp["page_s"] == pytest.approx(6 + 2 + 719 / 2), "the towers are torch's"
    assert "vision_s" not in llamacpp and torch["peak_over_weights"] == 2
    comparison = inference.compare(results, figures)["mindvlm:int8"]
    assert comparison["torch:float32"]["decode_speedup"] == pytest.approx(3 / (8 / 6))
    assert comparison["torch:float32"]["vision_speedup"] == pytest.approx(3)
    assert comparison["torch:float32"]["logits_relative_error"] == pytest.approx(1 / 34**0.5)
    assert comparison["torch:float32"]["equal_tokens"] == 2
    assert comparison["llamacpp:q8_0"].keys() == {"decode_speedup", "prefill_speedup", "page_speedup"}
    bits = {"mindvlm:int8": 8, "torch:float32": 32, "llamacpp:q8_0": 8}
    (line,) = inference.comparison_lines(inference.compare(results, figures), bits)
    assert line == "mindvlm:int8 against llamacpp:q8_0: decode 1.50x, prefill 2.00x, page 1.35x"
    exact = inference.comparison_lines(inference.compare(results, figures), bits | {"mindvlm:int8": 16})
    assert exact[0].startswith("mindvlm:int8 against torch:float32: decode") and "first 2 tokens equal" in exact[0]


def test_without_torch_a_decoder_alone_has_no_page():
    results = {
        "machine": [{"read_gb_per_s": 20.0}],
        "llamacpp:q8_0": [result(prefill=2.0, decode=4.0, ids=[], logits=[])],
    }
    assert "page_s" not in inference.summarize(results, num_tokens=8)["llamacpp:q8_0"]


def test_the_machine_is_a_computer():
    assert 1e8 < machine.read_bandwidth(1) < 1e13
    assert 1e8 < machine.matrix_flops(1) < 1e14


def test_contenders_are_peers_with_a_format():
    assert parse_contenders(["torch:float32,llamacpp:q8_0", "torch:float32"]) == [
        Contender("torch", "float32"),
        Contender("llamacpp", "q8_0"),
    ]
    assert [str(one) for one in parse_contenders(["torch"])] == ["torch:float32", "torch:bfloat16"]
    assert Contender("mindvlm", "int4,head=int4").bits == 4 and Contender("mindvlm", "auto").bits is None


def test_files_are_written_once_and_are_the_model(tmp_path, workload):
    stored = workload.with_files(tmp_path, [])
    (file,) = tmp_path.iterdir()
    with open_checkpoint(file) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.infos.items()} == dict(workload.shapes)
        assert {info.dtype for info in checkpoint.infos.values()} == {"bfloat16"}
    time = file.stat().st_mtime_ns
    assert workload.with_files(tmp_path, []) == stored and file.stat().st_mtime_ns == time
    other = make_workload("tinyllava_smoke", num_tokens=8).with_files(tmp_path, [])
    assert other.checkpoint != stored.checkpoint


@pytest.mark.parametrize("model", ["smoke", "tinyllava_smoke"])
@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q4_0", "q4_K"])
def test_llama_cpp_says_what_the_model_says(tmp_path, model, dtype):
    """Greedy ids of a text prompt, beside those of the torch reference on the weights that the file holds."""
    gguf, torch = pytest.importorskip("gguf"), pytest.importorskip("torch")
    pytest.importorskip("xllamacpp")
    from mindvlm.tools.benchmarks import llamacpp_peer

    workload = make_workload(model, num_tokens=8).with_files(tmp_path, [dtype])
    peer = llamacpp_peer.Inference(workload, dtype=dtype, num_threads=1)
    peer.prompt_ids = workload.text_ids(1, 40)
    peer.load()
    peer.compile()
    peer.prefill()
    ids = peer.decode()
    assert len(ids) == 8 and peer.describe()["stored_bytes"] < 4 * workload.num_parameters
    if dtype != "q4_K":
        reference = workload.reference(torch.float32)
        with torch.no_grad():
            for parameter in reference.parameters():
                # the towers take no part
                if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
                    kind = gguf.GGMLQuantizationType[dtype.upper()]
                    rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)
                    parameter.copy_(torch.from_numpy(rounded))
        generated = reference.generate(torch.from_numpy(peer.prompt_ids), max_new_tokens=8)
        assert ids[:4] == generated.ids[0, :4].tolist()


def test_the_process_that_starts_the_peers_holds_no_framework():
    code = "import sys, mindvlm.tools.benchmark; print([m for m in ('torch', 'mindspore') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_torch_peer_runs_without_mindspore():
    code = "import sys, mindvlm.tools.benchmarks.torch_peer; print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("model", ["smoke", "tinyllava_smoke"])
def test_both_frameworks_agree_on_a_whole_run(tmp_path, capsys, model):
    path = tmp_path / "figures.json"
    arguments = [
        "--model",
        model,
        "--weights",
        "float32",
        "--against",
        "torch:float32",
        "--rounds",
        "1",
        "--passes",
        "1",
    ]
    assert benchmark.main([*arguments, "--tokens", "8", "--threads", "1", "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "decode_tokens_per_s" in output and "first 8 tokens equal" in output and "machine: reads" in output
    report = json.loads(path.read_text())
    assert list(report["summary"]) == ["machine", "mindvlm:float32", "torch:float32"]
    comparison = report["comparison"]["mindvlm:float32"]["torch:float32"]
    assert comparison["equal_tokens"] == 8
    assert comparison["logits_relative_error"] < 1e-5
    for name in ("mindvlm:float32", "torch:float32"):
        (one,) = report["rounds"][name]
        assert list(one["seconds"]) == list(InferencePeer.PHASES)
        assert all(seconds > 0 for seconds in one["seconds"].values())


def test_a_decoder_alone_runs_without_the_picture(tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "figures.json"
    arguments = [
        "--model",
        "smoke",
        "--only",
        "llamacpp:q8_0",
        "--rounds",
        "2",
        "--passes",
        "2",
        "--tokens",
        "8",
        "--threads",
        "1",
    ]
    assert benchmark.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [len(rounds) for rounds in report["rounds"].values()] == [4, 4] and report["comparison"] == {}
    assert (
        report["rounds"]["llamacpp:q8_0"][0]["values"]["decode"]
        == report["rounds"]["llamacpp:q8_0"][1]["values"]["decode"]
    )
    assert not {"vision_s", "page_s"} & report["summary"]["llamacpp:q8_0"].keys()
    assert "the decoder alone" in capsys.readouterr().out


def test_a_growth_run_measures_every_point(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "LENGTHS", (128, 512))
    path = tmp_path / "figures.json"
    arguments = ["--growth", "--model", "smoke", "--only", "torch:float32", "--rounds", "1"]
    assert benchmark.main([*arguments, "--tokens", "3", "--threads", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["growth"]
    assert [(one["rows"], one["length"]) for one in figures] == [(1, 128), (1, 512), (2, 128)]
    assert all(one["prefill_tokens_per_s"] > 0 < one["decode_tokens_per_s"] for one in figures)
    output = capsys.readouterr().out
    assert "1 x 512" in output and "2 x 128" in output


def test_our_rows_grow_by_the_tokens_that_are_counted():
    peer = Inference(make_workload("smoke", num_tokens=8), dtype="float32", num_threads=1)
    peer.load()
    peer.engine.runner.graph_mode = False
    seconds = peer.grow(2, 70, 3)
    assert [len(slot.new_ids) for slot in peer.engine.slots] == [1 + 1 + 3] * 2
    assert [len(slot.request.ids) for slot in peer.engine.slots] == [70] * 2
    assert seconds.keys() == {"prefill_s", "first_s", "decode_s"} and min(seconds.values()) > 0


def test_the_rows_of_llama_cpp_are_independent(tmp_path):
    pytest.importorskip("xllamacpp")
    from mindvlm.tools.benchmarks import llamacpp_peer

    workload = make_workload("smoke", num_tokens=8).with_files(tmp_path, ["bf16"])
    peer = llamacpp_peer.Inference(workload, dtype="bf16", num_threads=1)
    assert min(peer.grow(2, 70, 3).values()) > 0
    ids = workload.text_ids(2, 70)
    together = peer.answer(ids, 6, cache_prompt=True)
    assert [len(row) for row in together] == [6, 6]
    peer.open_server(1, 80)
    assert together == [peer.answer(ids[row : row + 1], 6, cache_prompt=False)[0] for row in (0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (
            ["--train", "--model", "tinyllava_1_5b"],
            "tinyllava_1_5b: has no training benchmark; give vary_toy or smoke",
        ),
        (["--passes", "0"], "--passes 0: must be at least 1"),
        (["--tokens", "-3"], "--tokens -3: must be at least 1"),
        (["--layers", "7"], "--layers 7: the decoder has 1 to 2"),
        (["--against", "jax"], "'jax' is no contender; expected llamacpp, mindvlm, torch"),
        (["--against", "torch,llamacpp:q9"], "expected llamacpp:bf16, llamacpp:q8_0, llamacpp:q4_0, llamacpp:q4_K"),
        (["--weights", "int5"], "weights is 'int5'; expected one of auto"),
        (["--json", "no/such/folder/figures.json"], "does not exist"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(arguments, message, capsys):
    assert benchmark.main(["--model", "smoke", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_machine_that_cannot_run_it_is_told_so(workload, monkeypatch):
    monkeypatch.setitem(PEERS, "absent", PeerEntry("nowhere", {"int8": 8}, ("json", "no_such_framework")))
    with pytest.raises(UserError, match="pip install no_such_framework$"):
        inference.check_machine(workload, [Contender("absent", "int8")])
    monkeypatch.setattr(inference, "free_host_memory", lambda: 1000)
    with pytest.raises(UserError, match="end other programs"):
        inference.check_machine(workload, [Contender("mindvlm", "int8")])


def test_a_disk_without_room_is_told_so(tmp_path, workload, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the files of the benchmark need .* GB but 0.0 GB are free"):
        workload.with_files(tmp_path, [])


def test_a_peer_that_dies_is_named(workload, monkeypatch, capfd):
    monkeypatch.setitem(PEERS, "absent", PeerEntry("nowhere", {"int8": 8}, ("numpy",)))
    with pytest.raises(UserError, match="peer absent:int8 ended with status 1"):
        inference.run_peer(Contender("absent", "int8"), workload, num_passes=1, num_threads=1)
    assert "nowhere" in capfd.readouterr().err


# prompt and answer pass the 128 slots that the prompt alone takes
@pytest.mark.parametrize(("model", "num_tokens"), [("tinyllava_smoke", 64), ("smoke", 80)])
def test_nothing_is_compiled_in_the_measured_stages(monkeypatch, model, num_tokens):
    """Counts the graphs that would be compiled, and runs them in PyNative mode."""
    monkeypatch.setattr(runtime, "set_mode", lambda graph_mode, set_mode=runtime.set_mode: set_mode(False))
    monkeypatch.setattr(nn.Cell, "compile", lambda cell, *inputs: cell.phase_cache.update({cell.phase: ""}))
    workload = make_workload(model, num_tokens=num_tokens)
    peer, num_compiled = Inference(workload, dtype="float32", num_threads=1), {}
    for phase in peer.PHASES:
        getattr(peer, phase)()
        num_compiled[phase] = len(peer.engine.runner.compiled)
    assert num_compiled["load"] == 0 < num_compiled["compile"]
    assert {num_compiled[phase] for phase in peer.PHASES[1:]} == {num_compiled["compile"]}
    assert peer.engine.capacity == 256 and workload.prompt_ids.shape[1] <= 128
