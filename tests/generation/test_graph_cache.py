"""Compiled graphs on disk: when they are used, that results never depend on them, and which failures are tolerated."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import mindvlm
from mindvlm.core import caches
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import set_device
from mindvlm.generation import graph_cache
from mindvlm.generation.graph_cache import compile_cached, is_on
from tests.checkpoint.test_write_errors import file_size_limit
from tests.tiny_vary import write_tiny_vary

X = np.arange(8, dtype=np.float32).reshape(2, 4)


class Scaled(nn.Cell):
    """x * scale + weight, counted in a Parameter that the graph updates."""

    def __init__(self, scale: float, weight: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = Parameter(Tensor(np.full(4, weight, np.float32)), name="weight")
        self.calls = Parameter(Tensor(np.zeros(1, np.float32)), name="calls", requires_grad=False)

    def construct(self, x):
        ops.assign_add(self.calls, ops.ones_like(self.calls))
        return x * self.scale + self.weight


def compiles(cell: nn.Cell, x=X) -> bool:
    """Whether `compile_cached` compiles a graph; checks the result of the graph."""
    said: list[bool] = []
    compile_cached(cell, (Tensor(x),), lambda: said.append(True))
    assert len(said) < 2
    for _ in range(2):
        np.testing.assert_array_equal(cell(Tensor(x)).asnumpy(), x * cell.scale + cell.weight.asnumpy())
    assert cell.calls.asnumpy() == 2
    return bool(said)


def main(scale: float) -> None:
    """The program of the test with several processes."""
    set_device("CPU")
    print(compiles(Scaled(float(scale))))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache; returns the folder of its graphs."""
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(graph_cache, "_has_warned", False)
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield tmp_path / "cache" / "graphs"
    ms.set_context(mode=mode)


def test_the_second_start_reads_the_graph(folder):
    assert compiles(Scaled(2.0))
    (file,) = folder.iterdir()
    os.utime(file, (0, 0))
    assert not compiles(Scaled(2.0, weight=5.0))
    assert file.stat().st_mtime > 0
    assert not list(Path(graph_cache._exchange.folder.parent).glob(graph_cache._exchange.folder.name))


def test_other_constants_shapes_and_dtypes_are_compiled():
    assert all([compiles(Scaled(2.0)), compiles(Scaled(3.0)), compiles(Scaled(2.0), X[:1])])
    assert compiles(Scaled(2.0), X.astype(np.float16))
    assert not any([compiles(Scaled(2.0), X[:1]), compiles(Scaled(3.0)), compiles(Scaled(2.0))])


def test_other_compilations_between_do_not_matter():
    """MindSpore names its files by the number of the graph."""
    assert compiles(Scaled(4.0))
    for number in (5.0, 4.0, 6.0, 4.0, 5.0):
        Scaled(number).compile(Tensor(X))
        compiles(Scaled(number))
    graph_cache._exchange.index += 3
    assert compiles(Scaled(4.0)) is False and compiles(Scaled(7.0))
    assert not compiles(Scaled(4.0)) and not compiles(Scaled(7.0))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:99] + b"?" + data[100:]]
)
def test_a_damaged_file_is_compiled_and_replaced(folder, damage):
    assert compiles(Scaled(2.0))
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compiles(Scaled(2.0)) and not compiles(Scaled(2.0))


def test_the_file_of_another_graph_is_not_read(folder):
    assert compiles(Scaled(2.0))
    (other,) = folder.iterdir()
    assert compiles(Scaled(3.0))
    (file,) = set(folder.iterdir()) - {other}
    file.write_bytes(other.read_bytes())
    assert compiles(Scaled(3.0))


def test_a_graph_that_mindspore_refuses_is_compiled(folder):
    assert compiles(Scaled(2.0))
    (file,) = folder.iterdir()
    entry = graph_cache.Entry(file, file.stem.partition("-")[2])
    entry.write(entry.read().replace(b"Mul", b"Mux"))
    assert compiles(Scaled(2.0)) and not file.exists()


def test_a_cell_without_a_key_is_compiled(folder, recwarn):
    cell = Scaled(2.0)
    cell.held = object()
    assert compiles(cell) and not folder.exists() and not recwarn


def test_an_error_of_the_model_is_raised(folder):
    def refuse(*inputs):
        raise ValueError("wrong sizes")

    cell = Scaled(2.0)
    cell.compile = refuse
    with pytest.raises(ValueError, match="wrong sizes"):
        compiles(cell)
    assert compiles(Scaled(2.0))


def one_warning(recwarn) -> str:
    (found,) = recwarn
    return str(found.message)


def test_an_unwritable_folder_is_one_warning(folder, recwarn):
    folder.parent.write_text("a file")
    assert compiles(Scaled(2.0)) and compiles(Scaled(3.0))
    assert re.fullmatch(
        r"compiled graphs are not kept: .*cache.*; set MINDVLM_CACHE to a writable folder", one_warning(recwarn)
    )


def test_a_full_disk_is_one_warning(folder, recwarn, monkeypatch):
    with file_size_limit(1000):
        assert compiles(Scaled(2.0))
    assert "make room" in one_warning(recwarn) and not any(folder.iterdir())
    monkeypatch.setattr(graph_cache, "MIN_FREE_BYTES", 2**62)
    monkeypatch.setattr(graph_cache, "_has_warned", False)
    recwarn.clear()
    assert compiles(Scaled(2.0)) and compiles(Scaled(2.0))
    assert "No space left on device; set TMPDIR" in one_warning(recwarn)
    monkeypatch.undo()


def test_a_missing_temporary_folder_is_one_warning(recwarn, monkeypatch, tmp_path):
    monkeypatch.setattr(graph_cache, "_exchange", None)
    monkeypatch.setattr(graph_cache.tempfile, "tempdir", str(tmp_path / "none"))
    assert compiles(Scaled(2.0)) and compiles(Scaled(2.0))
    assert "set TMPDIR" in one_warning(recwarn)


def test_a_read_only_cache_is_read(folder, monkeypatch):
    assert compiles(Scaled(2.0))

    def refuse(*arguments):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(graph_cache.os, "utime", refuse)
    assert not compiles(Scaled(2.0))


def test_a_fork_compiles_without_the_cache(monkeypatch):
    assert compiles(Scaled(2.0))
    monkeypatch.setattr(graph_cache._exchange, "pid", -1)
    assert compiles(Scaled(2.0))


def test_the_oldest_graphs_go_first(folder, monkeypatch):
    for number in (2.0, 3.0, 4.0):
        compiles(Scaled(number))
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    os.utime(files[0])
    # sizes differ by some bytes, those of the names of nodes
    size = files[0].stat().st_size
    monkeypatch.setitem(caches.MAX_BYTES, "graphs", 7 * size // 2)
    assert compiles(Scaled(5.0)) and set(folder.iterdir()) > {files[0], files[2]} and not files[1].exists()
    monkeypatch.setitem(caches.MAX_BYTES, "graphs", size // 2)
    assert compiles(Scaled(6.0)) and len(list(folder.iterdir())) == 1


def start_process(code: str) -> subprocess.Popen:
    code = f"from tests.generation.test_graph_cache import *; {code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_processes_share_graphs(folder):
    """Two at once and one that is killed before MindSpore returns, then another one."""
    kill = "Scaled.compile = lambda *given: (nn.Cell.compile(*given), os.kill(os.getpid(), signal.SIGKILL))"
    running = [start_process("main(9)"), start_process("main(9)"), start_process(f"{kill}; main(8)")]
    *compiled, killed = [process.communicate()[0] for process in running]
    # on a busy machine, the second one may start when the graph of the first is there
    assert "True\n" in compiled and set(compiled) <= {"True\n", "False\n"} and killed == ""
    assert running[2].returncode == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == [".graph"]
    assert start_process("main(9), main(8)").communicate()[0] == "False\nTrue\n"
    assert not compiles(Scaled(9.0))


def test_the_environment_turns_it_off(monkeypatch):
    assert is_on()
    monkeypatch.setenv("MINDVLM_COMPILE_CACHE", "off")
    assert not is_on()
    monkeypatch.setenv("MINDVLM_COMPILE_CACHE", "on")
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    assert not is_on()
    monkeypatch.setenv("MINDVLM_COMPILE_CACHE", "no")
    with pytest.raises(UserError, match="MINDVLM_COMPILE_CACHE is 'no'; expected on or off"):
        is_on()


def test_a_model_is_compiled_once(folder, tmp_path):
    """The order of the second start differs: a text alone, then a picture."""
    config = write_tiny_vary(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    lines: list[str] = []

    def ask(*questions, **options) -> list[str]:
        lines.clear()
        model = mindvlm.load(config, mode="graph", progress=lines.append, **options)
        return [str(model.chat(text, images=picture, max_new_tokens=6)) for text, picture in questions]

    picture, text = ("Read.", image), ("Say it.", None)
    expected = ask(picture, text, cache=False)
    assert any("compiling" in line for line in lines) and not folder.exists()
    assert ask(picture, text) == expected and folder.exists()
    assert ask(text, picture) == expected[::-1]
    assert not any("compiling" in line for line in lines)
