"""Device and dtype choices on a machine without an NPU."""

import subprocess
import sys
import types

import mindspore as ms
import pytest

from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext, RuntimeConfig


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


def test_a_rank_table_gives_each_process_its_card(monkeypatch):
    calls = []
    monkeypatch.setattr(ms, "set_device", lambda *args: calls.append(args))
    monkeypatch.delenv("MS_ROLE", raising=False)
    monkeypatch.setenv("RANK_TABLE_FILE", "table.json")
    monkeypatch.setenv("DEVICE_ID", "3")
    runtime.set_device("Ascend")
    runtime.set_device("CPU")
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    runtime.set_device("Ascend")

    assert calls == [("Ascend", 3), ("CPU",), ("Ascend",)]


def test_a_rank_table_without_a_card(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    monkeypatch.delenv("DEVICE_ID", raising=False)
    monkeypatch.setenv("RANK_TABLE_FILE", "table.json")
    with pytest.raises(UserError, match="RANK_TABLE_FILE is set but DEVICE_ID is ''; set DEVICE_ID"):
        runtime.set_device("Ascend")


def test_start_sets_the_mode(no_npu):
    before = ms.get_context("mode")
    try:
        for mode, value in (("pynative", ms.PYNATIVE_MODE), ("graph", ms.GRAPH_MODE)):
            assert runtime.start(RuntimeConfig(device="cpu", mode=mode)) == BuildContext(dtype=ms.float32)
            assert ms.get_context("mode") == value
    finally:
        ms.set_context(mode=before)


@pytest.mark.parametrize(
    ("choice", "device", "npu", "expected"),
    [
        ("auto", "Ascend", "ascend910b", "auto"),
        ("auto", "Ascend", "ascend910_93", "auto"),
        ("auto", "Ascend", "ascend910", "eager"),
        ("auto", "Ascend", "ascend310p", "eager"),
        ("auto", "CPU", "", "eager"),
        ("fused", "Ascend", "ascend910b", "fused"),
        ("eager", "Ascend", "ascend910b", "eager"),
    ],
)
def test_choice_of_attention(choice, device, npu, expected):
    assert runtime.choose_attention(choice, device, npu) == expected


def test_fused_attention_where_there_is_none(no_npu):
    with pytest.raises(UserError, match="'fused' but the NPU is an ascend910; .* set attention: auto or eager"):
        runtime.choose_attention("fused", "Ascend", "ascend910")
    with pytest.raises(UserError, match="attention is 'fused' but the device is CPU"):
        runtime.start(RuntimeConfig(device="cpu", attention="fused"))
    assert runtime.start(RuntimeConfig(device="cpu")).attention == "eager"


def test_start_after_mindspore_has_run_already():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import mindspore as ms; (ms.Tensor([1.0]) + 1).asnumpy()\n"
            "from mindvlm.core import runtime; print(runtime.start(runtime.RuntimeConfig(device='cpu')).dtype)",
        ],
        capture_output=True,
        text=True,
    )

    assert done.stdout.strip() == "Float32", done.stderr


@pytest.mark.parametrize("free, expected", [(7, 7), (0, None)])
def test_free_memory_of_an_npu(monkeypatch, free, expected):
    monkeypatch.setattr(ms.hal, "get_device_properties", lambda *_: types.SimpleNamespace(free_memory=free))
    assert runtime.free_device_memory() == expected


def test_an_npu_that_does_not_say(monkeypatch):
    def unknown(*_):
        raise RuntimeError("no device")

    monkeypatch.setattr(ms.hal, "get_device_properties", unknown)
    assert runtime.free_device_memory() is None
