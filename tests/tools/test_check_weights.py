"""`mindvlm-check`: planted faults of weights, device and dtype, and what it says of memory."""

import argparse

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, RawTensor, write_checkpoint
from mindvlm.generation import memory
from mindvlm.tools import preflight, preflight_memory
from mindvlm.tools.check_model import build_parser
from tests.tiny_vary import tiny_config, tiny_weights, write_tiny_vary, write_yaml
from tests.tools.checked import assert_failed, checker, found, statuses


@pytest.fixture
def config_path(tmp_path):
    return write_tiny_vary(tmp_path)


@pytest.fixture
def check(monkeypatch, capsys):
    return checker(monkeypatch, capsys)


def rewrite(config_path, change) -> None:
    weights = tiny_weights(tiny_config())
    change(weights)
    write_checkpoint(config_path.parent / "tiny.safetensors", MemorySource(weights))


NORM = "language_model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, row",
    [
        (lambda weights: weights.pop(NORM), ["missing", NORM]),
        (lambda weights: weights.update(new=np.zeros(2, np.float32)), ["unexpected", "new"]),
        (lambda weights: weights.update({NORM: np.zeros(31, np.float32)}), ["shape", NORM, "[31]", "[32]"]),
        (lambda weights: weights.update({NORM: np.zeros(32, np.int32)}), ["dtype", NORM, "int32"]),
    ],
)
def test_weights_that_do_not_fit(check, config_path, change, row):
    rewrite(config_path, change)
    result = check("--config_path", config_path)
    assert_failed(result, {"weights": "FAILED", "dtype": "skipped"}, "1 " + row[0], NORM if NORM in row else "new")
    table = [line for line in result[1].splitlines() if line.startswith("    ")]
    assert any(all(text in line for text in row) for line in table)


def test_weights_of_another_size_fold_into_a_short_table(check, config_path):
    write_yaml(config_path.parent, tiny_config(model__language_model__intermediate_size=40))
    result = check("--config_path", config_path)
    assert_failed(result, {"weights": "FAILED", "dtype": "skipped"}, "does not fit", "6 shape")
    rows = [line for line in result[1].splitlines() if line.startswith("    shape  ")]
    assert len(rows) == 3 and all("layers.{}.mlp." in row and "(0-1)" in row for row in rows)


def test_a_device_that_is_not_there(check, config_path):
    result = check("--config_path", config_path, "--device", "ascend")
    assert_failed(result, {"device": "FAILED", "dtype": "skipped", "memory": "skipped"}, "no Ascend NPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_compute_dtype_that_the_cpu_does_not_have(check, config_path, dtype):
    write_yaml(config_path.parent, tiny_config(dtype=dtype))
    status, out, err = check("--config_path", config_path)
    assert (status, err) == (0, "") and statuses(out)["dtype"] == "warning"
    assert f"computed in float32 and not in {dtype}" in out
    assert out.splitlines()[-1] == "ready, with warnings: dtype"


def test_stored_dtypes(check, config_path):
    def narrow(weights):
        for name, array in weights.items():
            weights[name] = RawTensor.from_array(array).cast("float16" if "norm" in name else "bfloat16")

    rewrite(config_path, narrow)
    _, out, _ = check("--config_path", config_path)
    ((status, text),) = found(out)["dtype"]
    assert status == "ok" and "bfloat16 (1 MiB)" in text and "float16 (1 MiB)" in text and "without loss" in text


@pytest.mark.parametrize(
    "stored, computed, status, expected",
    [
        ("float32", "float16", "warning", "beyond 65504"),
        ("bfloat16", "float16", "warning", "beyond 65504"),
        ("float16", "float16", "ok", "computed in float16"),
        ("float32", "bfloat16", "ok", "rounded"),
        ("float64", "float32", "ok", "rounded"),
        ("bfloat16", "float32", "ok", "without loss"),
    ],
)
def test_what_an_npu_makes_of_stored_dtypes(stored, computed, status, expected):
    source = MemorySource({"a": RawTensor.from_array(np.ones(2)).cast(stored)})
    config = argparse.Namespace(dtype=computed)
    run = preflight.Run(argparse.Namespace(), config=config, weights=source, device="Ascend", dtype=computed)
    ((found_status, text),) = preflight.check_dtype(run)
    assert found_status == status and expected in text


def test_memory_that_is_not_enough_for_anything(check, config_path, monkeypatch):
    monkeypatch.setattr(preflight_memory, "free_host_memory", lambda: 100 * memory.MIB)
    result = check("--config_path", config_path)
    assert_failed(result, {"memory": "FAILED"}, "but 100 MiB are free", "more memory")
    assert "max_length" not in found(result[1])["memory"][0][1] and "ready" not in result[1]


def test_memory_that_is_not_enough_for_the_longest_context(check, config_path, monkeypatch):
    write_yaml(config_path.parent, tiny_config(model__max_length=32000, model__language_model__training_length=32000))
    config = preflight.Run(build_parser().parse_args(["--config_path", str(config_path)]))
    list(preflight.check_config(config))
    lm = config.config.model.language_model
    room = memory.cache_bytes(lm, 16384, 4)
    assert room > 4 * memory.MIB
    _, out, _ = check("--config_path", config_path)
    needed = int(found(out)["memory"][0][1].partition("32000 tokens ")[2].split()[0]) * memory.MIB
    monkeypatch.setattr(preflight_memory, "free_host_memory", lambda: needed - room)
    _, out, _ = check("--config_path", config_path)
    status, text = found(out)["memory"][0]
    assert status == "warning" and "set model.max_length to 16000 or less" in text


def test_memory_that_cannot_be_told(check, config_path, monkeypatch):
    monkeypatch.setattr(preflight_memory, "free_host_memory", lambda: None)
    status, out, _ = check("--config_path", config_path)
    assert status == 0 and "is unknown" in found(out)["memory"][0][1]


def test_a_prompt_that_is_longer_than_the_context(check, config_path):
    result = check("--config_path", config_path, "--num_images", 50)
    assert_failed(result, {"memory": "FAILED"}, "with 50 pictures", "longer than the context of 320")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--num_images", -1], "--num_images is -1"),
        (["--num_prompt_tokens", 0], "--num_prompt_tokens is 0"),
    ],
)
def test_options_out_of_range(check, options, expected):
    status, out, err = check(*options)
    assert (status, out) == (2, "") and err.startswith(f"error: {expected}")


def test_a_prompt_shorter_than_its_pictures(check, config_path):
    result = check("--config_path", config_path, "--num_prompt_tokens", 7)
    assert_failed(result, {"memory": "FAILED"}, "1 picture take 8 tokens")


def test_memory_by_format_of_the_weights(check, config_path, monkeypatch, kernels):
    needed = {"float32": 900, "16bit": 700, "int8": 500, "int8c": 480, "int4": 400, "int4k": 400}

    def estimate(*arguments, formats=None, **options):
        chosen = formats["decoder"] if formats else "auto"
        size = needed["float32" if chosen == "auto" else chosen] * memory.MIB
        return memory.MemoryEstimate(0, size, size, 0, 0, 0, 0)

    monkeypatch.setattr(memory, "estimate_memory", estimate)
    monkeypatch.setattr(preflight_memory, "free_host_memory", lambda: 600 * memory.MIB)
    listed = (
        "float32 900 MiB (does not fit), 16bit 700 MiB (does not fit), int8 500 MiB, int8c 480 MiB, int4 400 MiB, "
        "int4k 400 MiB"
    )
    for options, status in (((), "FAILED"), (("--weights", "int8"), "ok"), (("--weights", "16bit"), "FAILED")):
        _, out, _ = check("--config_path", config_path, *options)
        first, second = found(out)["memory"]
        assert first[0] == status and ("set weights: int8, or" in first[1]) == (status == "FAILED")
        assert second == ("ok", f"until the first answer with weights: {listed}")
    assert "weights is 'int7'" in check("--config_path", config_path, "--weights", "int7")[1]
