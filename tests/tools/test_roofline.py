"""The counted operations and bytes, and the round trips that the page on NPUs names."""

import pytest

from mindvlm.generation.sampling import GreedyGraph
from mindvlm.tools import benchmark
from mindvlm.tools.benchmarks import roofline
from mindvlm.tools.benchmarks.mindvlm_peer import Inference
from mindvlm.tools.benchmarks.roofline import Cost, Device, page_seconds, stage_costs


def test_costs_are_those_of_the_shapes():
    """The decoder of Vary-toy: 24 layers, 2048 wide, 5504 inside; a prompt of 292 tokens, an answer of 40."""
    model = benchmark.MODELS["vary_toy"]
    workload = model.workload(model.config(), seed=0, num_tokens=40)
    costs = stage_costs(workload, value_bytes=2, num_tokens=40)
    blocks = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5504)
    head = 2048 * workload.config["vocab_size"]
    # norms and biases are read too
    vectors = 24 * (2 * 2048 + 3 * 2048) + 2048
    assert costs["decode"].flops == 2 * (blocks + head) + 24 * 4 * 2048 * (292 + 20 + 1)
    assert costs["decode"].num_bytes == 2 * (blocks + head + vectors + 24 * 2 * 2048 * (292 + 20))
    assert costs["prefill"].flops == pytest.approx(2 * (292 * blocks + head) + 24 * 4 * 2048 * 292**2, rel=0.02)
    assert 1.0e12 < costs["vision"].flops < 1.2e12
    assert costs["vision"].num_bytes == 2 * (workload.num_parameters - blocks - 2 * head - vectors)


def test_the_slower_of_both_bounds_counts():
    device = Device(flops=10.0, bandwidth=2.0)
    assert Cost(100.0, 4.0).seconds(device) == 10.0 and Cost(10.0, 4.0).seconds(device) == 2.0
    costs = {"vision": Cost(10.0, 0.0), "prefill": Cost(20.0, 0.0), "decode": Cost(0.0, 6.0)}
    assert page_seconds(costs, device, num_tokens=5) == 1 + 2 + 15


def test_the_command_prints_every_stage(capsys):
    assert roofline.main(["--model", "tinyllava_smoke"]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("vision", "prefill", "decode", "page", "Ascend 910A", "tokens/s at most"))
    assert roofline.main(["--bits", "4"]) == 2
    assert "--bits 4: expected 8, 16 or 32" in capsys.readouterr().err


def test_a_decode_step_on_an_npu_runs_two_graphs_and_waits_for_the_ids_alone(monkeypatch):
    model = benchmark.MODELS["smoke"]
    peer = Inference(model.workload(model.config(), seed=0, num_tokens=8), dtype="float32", num_threads=1)
    peer.load()
    peer.engine.runner.graph_mode = False
    peer.engine.sampler.greedy = GreedyGraph()
    peer.vision()
    peer.prefill()
    graphs = []
    run = peer.engine.runner.run
    monkeypatch.setattr(
        peer.engine.runner, "run", lambda stage, graph, *inputs: graphs.append(graph) or run(stage, graph, *inputs)
    )
    monkeypatch.setattr(peer.engine.sampler, "run", peer.engine.runner.run)
    peer.generate(3)
    assert graphs == [peer.engine.decode, peer.engine.sampler.greedy] * 3
