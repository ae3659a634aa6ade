"""The graphs of predict and training on Ascend pass the compiler's front end: shapes and dtypes of every operator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PREDICT = ["vision", "merge", "prefill", "decode", "score", "greedy", "sample"]


def compile_graphs(
    folder: Path,
    config: str,
    dtype: str,
    attention: str,
    graphs: list[str],
    *,
    job: str = "predict",
    num_processes: int = 1,
) -> dict[str, list[int]]:
    """Fused attentions, forward and backward, of each graph by name; fails where one does not compile."""
    request = {"config": str(CONFIGS / config), "dtype": dtype, "attention": attention, "job": job, "graphs": graphs}
    request["num_processes"] = num_processes
    num_ranks = "2" if job.endswith("parallel step") else str(num_processes)
    done = subprocess.run(
        [sys.executable, "-m", "tests.ascend.compile_graphs", json.dumps(request)],
        # the compiler leaves a folder of what failed where it runs
        cwd=folder,
        env={**os.environ, "MS_SIMULATION_LEVEL": "0", "RANK_SIZE": num_ranks, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = {result["name"]: result["error"] for result in results if result["error"]}
    assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())
    assert [result["name"] for result in results] == graphs
    return {result["name"]: result["num_fused"] for result in results}


@pytest.mark.parametrize(
    ("config", "dtype", "num_in_vision"),
    [
        ("vary/vary_toy.yaml", "bfloat16", 3),
        pytest.param("vary/vary_tiny.yaml", "float16", 2, marks=pytest.mark.ci),
        # SigLIP's heads are padded, TinyLlama's keys are fewer than its queries
        ("tinyllava/tinyllava_1_5b.yaml", "bfloat16", 2),
        pytest.param("tinyllava/tinyllava_3_1b.yaml", "float16", 2, marks=pytest.mark.ci),
    ],
)
def test_predict_with_fused_attention(tmp_path, config, dtype, num_in_vision):
    num_fused = compile_graphs(tmp_path, config, dtype, "fused", PREDICT)

    assert num_fused["vision"] == [num_in_vision, 0]
    assert num_fused["prefill"] == num_fused["decode"] == num_fused["score"] == [2, 0]
    assert num_fused["merge"] == num_fused["greedy"] == num_fused["sample"] == [0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.ci)])
def test_predict_with_global_views_and_crops(tmp_path, dtype):
    num_fused = compile_graphs(tmp_path, "slime/slime_8b.yaml", dtype, "fused", [*PREDICT, "crops"])

    # a layer of the tower and a resampler
    assert num_fused["vision"] == num_fused["crops"] == [2, 0]
    assert num_fused["prefill"] == num_fused["decode"] == num_fused["score"] == [2, 0]


@pytest.mark.ci
def test_predict_pictures(tmp_path):
    """The VQGAN computes in float32 beside a decoder of 16 bits."""
    num_fused = compile_graphs(tmp_path, "delvm/delvm_300m.yaml", "float16", "fused", [*PREDICT, "picture"])

    assert num_fused["vision"] == num_fused["picture"] == [0, 0]
    assert num_fused["prefill"] == num_fused["decode"] == num_fused["score"] == [2, 0]


@pytest.mark.ci
@pytest.mark.parametrize("attention", ["fused", "eager"])
def test_predict_in_one_of_eight_processes(tmp_path, attention):
    """Each has 8 query heads and one key head of 70B."""
    graphs = ["vision", "crops", "merge", "prefill", "decode", "score"]
    num_fused = compile_graphs(tmp_path, "slime/slime_70b.yaml", "bfloat16", attention, graphs, num_processes=8)

    assert num_fused["prefill"] == num_fused["decode"] == [2 if attention == "fused" else 0, 0]


@pytest.mark.ci
def test_predict_with_eager_attention(tmp_path):
    num_fused = compile_graphs(tmp_path, "vary/vary_toy.yaml", "bfloat16", "eager", ["prefill", "decode"])

    assert num_fused == {"prefill": [0, 0], "decode": [0, 0]}


@pytest.mark.ci
@pytest.mark.parametrize("config", ["tinyllava_1_5b.yaml", "tinyllava_3_1b.yaml"])
def test_eager_attention_in_float16(tmp_path, config):
    """Grouped heads, and scores in float32."""
    graphs = compile_graphs(tmp_path, f"tinyllava/{config}", "float16", "eager", ["prefill", "decode", "score"])

    assert graphs == dict.fromkeys(("prefill", "decode", "score"), [0, 0])


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    # Vary-toy's towers are frozen: their attentions have no gradient
    [
        ("vary/vary_toy.yaml", "float16", [5, 2]),
        pytest.param("vary/vary_tiny.yaml", "bfloat16", [4, 4], marks=pytest.mark.ci),
        pytest.param("tinyllava/tinyllava_1_5b.yaml", "float16", [4, 2], marks=pytest.mark.ci),
        # the tower for both kinds of view, two resamplers, two layers
        ("slime/slime_8b.yaml", "bfloat16", [6, 4]),
        # rows of several segments
        pytest.param("delvm/delvm_300m.yaml", "float16", [2, 2], marks=pytest.mark.ci),
    ],
)
def test_training_step(tmp_path, config, dtype, expected):
    """float16 with its loss scale, bfloat16 with float32 copies of the weights."""
    assert compile_graphs(tmp_path, config, dtype, "fused", ["step"], job="step") == {"step": expected}


@pytest.mark.ci
def test_training_step_of_several_passes(tmp_path):
    num_fused = compile_graphs(
        tmp_path, "vary/vary_toy.yaml", "bfloat16", "fused", ["accumulate", "update"], job="passes"
    )

    assert num_fused == {"accumulate": [5, 2], "update": [0, 0]}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("config", "job", "expected"),
    [
        ("vary/vary_toy.yaml", "lora step", [5, 2]),
        ("vary/vary_toy.yaml", "recomputed step", [7, 2]),
        ("slime/slime_7b.yaml", "lora step", [6, 2]),
        ("slime/slime_7b.yaml", "recomputed step", [8, 4]),
        ("tinyllava/tinyllava_3_1b.yaml", "lora step", [4, 2]),
        ("tinyllava/tinyllava_2_0b.yaml", "recomputed step", [6, 2]),
        ("delvm/delvm_1b.yaml", "recomputed step", [4, 2]),
        ("delvm/delvm_1b.yaml", "parallel step", [2, 2]),
    ],
)
def test_training_step_of_another_kind(tmp_path, config, job, expected):
    num_fused = compile_graphs(tmp_path, config, "bfloat16", "fused", [job], job=job)

    assert num_fused == {job: expected}


@pytest.mark.parametrize(
    "job", ["distilled step", *(pytest.param(job, marks=pytest.mark.ci) for job in ("step", "distilled parallel step"))]
)
def test_training_step_of_codes(tmp_path, job):
    """Two layers of the student, and two of the teacher without a gradient."""
    num_fused = compile_graphs(tmp_path, "delvm/delvm_300m.yaml", "float16", "fused", [job], job=job)

    assert num_fused == {job: [2 if job == "step" else 4, 2]}


def test_training_step_of_one_among_four_processes(tmp_path):
    """dp 2 x tp 2 with ZeRO-2: the collectives that the CPU backend lacks."""
    num_fused = compile_graphs(
        tmp_path, "vary/vary_toy.yaml", "bfloat16", "fused", ["parallel step"], job="parallel step"
    )

    assert num_fused == {"parallel step": [5, 2]}
