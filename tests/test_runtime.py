"""Device and dtype choices on a machine without an NPU."""

import subprocess
import sys

import mindspore as ms
import pytest

from mindvlm import runtime
from mindvlm.errors import UserError
from mindvlm.runtime import RuntimeConfig


@pytest.fixture
def no_npu(monkeypatch):
    monkeypatch.setattr(ms.device_context.ascend, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits_are_computed_in_float32_on_cpu_and_said(name):
    with pytest.warns(UserWarning, match=f"{name} is computed in float32 on CPU") as caught:
        assert runtime.compute_dtype(name, "CPU") == ms.float32
    assert len(caught) == 1


def test_float32_says_nothing(recwarn):
    assert runtime.compute_dtype("float32", "CPU") == ms.float32
    assert not recwarn


def test_ascend_keeps_the_dtype(recwarn):
    assert runtime.compute_dtype("bfloat16", "Ascend") == ms.bfloat16
    assert runtime.compute_dtype("float16", "Ascend") == ms.float16
    assert not recwarn


def test_an_absent_npu(no_npu):
    with pytest.raises(UserError, match="no Ascend NPU here; set device: cpu or auto"):
        runtime.start(RuntimeConfig(device="ascend"))
    assert runtime.choose_device("auto") == "CPU"


def test_auto_takes_an_npu(monkeypatch):
    monkeypatch.setattr(ms.device_context.ascend, "is_available", lambda: True)
    assert runtime.choose_device("auto") == "Ascend"
    assert runtime.choose_device("cpu") == "CPU"


def test_a_device_that_cannot_be_set_is_one_line(monkeypatch):
    def fail(name):
        raise RuntimeError("busy\nC++ call stack\n...")

    monkeypatch.setattr(ms, "set_device", fail)
    with pytest.raises(UserError) as caught:
        runtime.set_device("Ascend")
    assert str(caught.value) == "device 'Ascend' cannot be used: busy; start a new process"


def test_start_sets_the_mode(no_npu):
    before = ms.get_context("mode")
    try:
        for mode, value in (("pynative", ms.PYNATIVE_MODE), ("graph", ms.GRAPH_MODE)):
            assert runtime.start(RuntimeConfig(device="cpu", mode=mode)) == ms.float32
            assert ms.get_context("mode") == value
    finally:
        ms.set_context(mode=before)


def test_start_after_mindspore_has_run_already():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import mindspore as ms; (ms.Tensor([1.0]) + 1).asnumpy()\n"
            "from mindvlm import runtime; print(runtime.start(runtime.RuntimeConfig(device='cpu')))",
        ],
        capture_output=True,
        text=True,
    )

    assert done.stdout.strip() == "Float32", done.stderr
