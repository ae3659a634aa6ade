"""The logits check around the two sides: their processes, what is made of their outputs, and failures in one line."""

import json
import shutil

import numpy as np
import pytest

from mindvlm.checkpoint import CastSource, MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.parity import process as parity_process
from mindvlm.convert.parity.comparison import compare_logits, read_report
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.stages import STEP_LOGITS
from mindvlm.convert.parity.vary import MODELS
from mindvlm.convert.random_weights import RandomSource
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.planning import make_plan
from tests.convert.parity.parity_bench import (
    CONFIG,
    TEXT_CONFIG,
    in_this_process,
    native_tensors,
    request,
    source_tensors,
    swapped,
    write,
)
from tests.known_models import ALL

LAYER = "language_model.layers.1."


def test_the_processes_agree_on_a_whole_model(tmp_path, monkeypatch, said):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    tensors = source_tensors(CONFIG)
    source, target = tmp_path / "model.safetensors", tmp_path / "vary.ckpt"
    write_checkpoint(source, CastSource(MemorySource(tensors), "bfloat16"))
    write_checkpoint(target, CastSource(CastSource(MemorySource(native_tensors(tensors)), "bfloat16"), "float16"))
    report = compare_logits(request(str(source), str(target), CONFIG, dtype="float16"))

    assert report.passed, report.table()
    assert "greedy ids: 4 of 4 equal" in report.table()
    assert [line for line in said if line.startswith("loading the source into the reference, torch")]
    assert "compiling the decode graph" in said
    record = json.loads(json.dumps(report.record(), allow_nan=False))
    assert record["passed"] and record["greedy_ids"] == {"compared": 4, "equal": 4, "different": []}
    assert record["reference"]["peak_memory_bytes"] > 0
    assert not list((tmp_path / "temporary").iterdir())


def test_a_swap_in_a_model_without_towers_is_found(tmp_path):
    tensors = source_tensors(TEXT_CONFIG)
    source = write(tmp_path / "model.safetensors", tensors)
    native = native_tensors(tensors)
    target = write(
        tmp_path / "target.safetensors",
        swapped(native, LAYER + "mlp.gate_proj.weight", "language_model.layers.1.mlp.up_proj.weight"),
    )

    with in_this_process():
        report = compare_logits(request(source, target, TEXT_CONFIG))

    assert [stage.key for stage in report.stages] == ["merged_embeddings", "layers", "logits", STEP_LOGITS]
    assert report.stages[0].passed and report.failed_stages[0].key == "layers"
    assert "FAILED from layer 1 on" in report.table()


def made_up(folder, side: str, **stages: np.ndarray) -> None:
    metadata = {"framework": side, "seconds": "2", "peak_memory_bytes": "3000000000"}
    write_checkpoint(folder / f"{side}.safetensors", MemorySource(stages), metadata=metadata)


def logits_with_top(*ids: int) -> np.ndarray:
    """(steps, 8) whose largest entry is at the given id and whose second largest, 1e-6 below, at the next id."""
    logits = np.zeros((len(ids), 8), np.float32)
    for step, token in enumerate(ids):
        logits[step, token], logits[step, (token + 1) % 8] = 1, 1 - 1e-6
    return logits


def test_a_tie_is_reported_and_does_not_fail(tmp_path):
    expected = logits_with_top(3, 5)
    actual = expected.copy()
    actual[1, 6] += 2e-6
    made_up(tmp_path, "reference", logits=expected, step_logits=expected, greedy_ids=np.array([3, 5], np.int32))
    made_up(tmp_path, "mindspore", logits=actual, step_logits=actual, greedy_ids=np.array([3, 6], np.int32))

    report = read_report(tmp_path, MODELS["vary_toy"], 1e-5)

    assert report.passed
    assert "greedy ids: 1 of 2 equal; step 1: 6 instead of 5" in report.table()
    assert "a tie" in report.table()
    assert report.record()["greedy_ids"]["different"][0]["step"] == 1


def test_another_id_by_more_than_rounding_fails(tmp_path):
    expected, actual = logits_with_top(3, 5), logits_with_top(3, 7)
    made_up(tmp_path, "reference", logits=expected, step_logits=expected, greedy_ids=np.array([3, 5], np.int32))
    made_up(tmp_path, "mindspore", logits=expected, step_logits=actual, greedy_ids=np.array([3, 7], np.int32))

    report = read_report(tmp_path, MODELS["vary_toy"], 1e-5)

    assert not report.passed
    assert "FAILED" in report.table().splitlines()[-3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_fails(tmp_path, value):
    made_up(tmp_path, "reference", logits=np.ones((2, 8), np.float32))
    made_up(tmp_path, "mindspore", logits=np.full((2, 8), value, np.float32))
    assert not read_report(tmp_path, MODELS["vary_toy"], 1e-5).passed


def test_a_stage_on_one_side_only_or_of_another_shape_fails(tmp_path):
    ones = np.ones((2, 8), np.float32)
    made_up(tmp_path, "reference", logits=ones, connector=ones, merged_embeddings=ones)
    made_up(tmp_path, "mindspore", logits=ones, connector=ones[:1])

    report = read_report(tmp_path, MODELS["vary_toy"], 1e-5)

    assert [(stage.key, stage.note) for stage in report.failed_stages] == [
        ("connector", "shape [1, 8] in the target"),
        ("merged_embeddings", "only in the source"),
    ]


def test_nothing_to_compare_is_no_success(tmp_path):
    for side in ("reference", "mindspore"):
        made_up(tmp_path, side, unknown=np.ones(1, np.float32))
    with pytest.raises(UserError, match="nothing to compare"):
        read_report(tmp_path, MODELS["vary_toy"], 1e-5)


def test_an_unknown_model_is_one_line():
    with pytest.raises(UserError, match=r"not defined for 'gpt'; expected one of: vary_toy"):
        compare_logits(ParityRequest(family="vary", model="gpt", source_paths=[], target="", config={}))
    with pytest.raises(UserError, match=r"not defined for 'gpt'; no model of the family 'other'"):
        compare_logits(ParityRequest(family="other", model="gpt", source_paths=[], target="", config={}))


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"run: pip install torch$") as failure:
        compare_logits(request("source.safetensors", "target.safetensors", CONFIG))
    assert "\n" not in str(failure.value)


def test_a_source_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"absent.safetensors: no such file") as failure:
        compare_logits(request(str(tmp_path / "absent.safetensors"), "", CONFIG))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("status", "stderr", "expected"),
    [
        (2, "warning\nmodel.bin: no such file\n", "model.bin: no such file"),
        (-9, "", "the torch reference failed (killed by SIGKILL, probably out of memory); free memory"),
        (1, "Traceback\nMemoryError: Unable to allocate 1 GiB\n", "free memory"),
        (1, "OutOfMemoryError: CUDA out of memory. Tried\n", "CUDA_VISIBLE_DEVICES="),
        (1, "Traceback\nKeyError: 'kv_channels'\n", "(KeyError: 'kv_channels'); this is an error of the check"),
    ],
)
def test_the_failure_of_a_process_becomes_one_line(status, stderr, expected):
    message = parity_process.failure_message("reference", status, stderr)
    assert expected in message and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "model"), [("toy", "vary_toy"), ("tiny_opt", "vary_tiny"), ("clip", "vary_toy"), ("sam", "vary_toy")]
)
def test_recorded_cases_pass(golden_dir, tmp_path, case, model):
    folder = golden_dir(f"vary/{case}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = str(shutil.copy(folder / "weights.safetensors", tmp_path))

    report = compare_logits(
        ParityRequest(family="vary", model=model, source_paths=[weights], target=weights, config=config)
    )

    assert report.passed, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vary_toy", "tinyllava_llama", "tinyllava_stablelm", "tinyllava_phi"])
def test_full_size_within_memory(tmp_path, name):
    """1.5 to 3.2 B parameters in bfloat16: 5 to 15 minutes each, 13 GB of disk, 20 GB of memory."""
    model = next(model for model in ALL if model.name == name)
    source, target = tmp_path / "model.safetensors", tmp_path / "native.safetensors"
    infos = model.released_infos()
    native = RandomSource({key: info.shape for key, info in infos.items()}, 0)
    write_checkpoint(target, CastSource(native, "bfloat16"))
    with open_checkpoint(target) as checkpoint:
        write_checkpoint(source, make_plan(model.hf.reverse(), checkpoint.infos).view(checkpoint))
    config, paths = model.released_config(), {"source_paths": [str(source)], "target": str(target)}

    report = compare_logits(ParityRequest(family=model.family, model=name, config=config, num_tokens=32, **paths))

    assert report.passed, report.table()
    assert report.num_equal >= 31
    num_bytes = 4 * sum(info.num_elements for info in infos.values())
    assert max(side.peak_memory_bytes for side in (report.reference, report.mindspore)) < 1.56 * num_bytes
