"""The key of a compiled graph differs wherever the graph might, and nowhere else."""

import functools
import importlib
import sys
import threading
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.generation import sampling
from mindvlm.generation.graph_key import NoKeyError, graph_key
from mindvlm.generation.sampling import GreedyGraph
from mindvlm.nn.dropout import RowDropout, new_counter
from mindvlm.nn.linear import Linear
from mindvlm.nn.native_layers import JointProducts, NativeRMSNorm

OFFSET = 1.0


def offset(x):
    return x + OFFSET


class Small(nn.Cell):
    def __init__(self, *, scale=2.0, table=(1, 2), axis=-1, name="w", shape=(4, 4), dtype=ms.float32, function=offset):
        super().__init__()
        self.scale = scale
        self.table = Tensor(np.array(table, np.float32))
        self.softmax = ops.Softmax(axis)
        self.w = Parameter(Tensor(np.zeros(shape), dtype), name=name)
        self.function = function
        self.inner = Linear(4, 4)

    def construct(self, x):
        return self.softmax(self.function(self.inner(x)) * self.scale)


def key(*, shape=(2, 4), dtype=ms.float32, **options) -> str:
    return graph_key(Small(**options), (Tensor(np.zeros(shape), dtype),))


def other_offset(x):
    return x + OFFSET


def scaled_by(number: float):
    return lambda x: x * number


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": 2.0 + 1e-15},
        {"scale": 2},
        {"scale": Tensor([2.0])},
        {"table": (1, 3)},
        {"table": (1, 2, 3)},
        {"axis": 0},
        {"name": "v"},
        {"shape": (4, 5)},
        {"dtype": ms.float16},
        {"function": other_offset},
        {"function": scaled_by(2.0)},
        {"function": functools.partial(offset)},
    ],
    # no addresses, which differ between the workers of a run
    ids=range(12),
)
def test_what_a_cell_holds_changes_the_key(changed):
    assert key(**changed) != key()


def test_closures_change_the_key():
    assert key(function=scaled_by(2.0)) == key(function=scaled_by(2.0)) != key(function=scaled_by(3.0))


def test_shapes_and_dtypes_of_inputs_change_the_key():
    keys = {key(), key(shape=(3, 4)), key(shape=(2, 1, 4))}
    cell = Small()
    keys |= {graph_key(cell, (Tensor(np.zeros((2, 4)), dtype),)) for dtype in (ms.float16, ms.float32, ms.int32)}
    assert len(keys) == 5


def test_code_changes_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(sys.modules[__name__], "OFFSET", 2.0)
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(Linear, "construct", lambda self, x: x)
    assert key() != before
    monkeypatch.undo()
    greedy = graph_key(GreedyGraph(), (Tensor(np.zeros((1, 4), np.float32)),))
    monkeypatch.setattr(sampling, "where_finite", lambda logits, ids: ids)
    assert graph_key(GreedyGraph(), (Tensor(np.zeros((1, 4), np.float32)),)) != greedy
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "NOT_FINITE", -2)
    assert graph_key(GreedyGraph(), (Tensor(np.zeros((1, 4), np.float32)),)) != greedy
    monkeypatch.undo()
    assert key() == before


def test_a_changed_source_file_changes_the_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "from mindspore import nn\n\n\nclass Cell(nn.Cell):\n    def construct(self, x):\n        return x + 1\n"
    file = tmp_path / "source_of_a_graph.py"
    file.write_text(source)
    inputs = (Tensor([1.0]),)
    module = importlib.import_module("source_of_a_graph")
    before = graph_key(module.Cell(), inputs)
    # MindSpore reads the file, not the code in memory
    file.write_text(source.replace("+ 1", "+ 2"))
    assert graph_key(module.Cell(), inputs) != before
    file.unlink()
    with pytest.raises(NoKeyError, match="without a source file"):
        graph_key(module.Cell(), inputs)


def test_settings_of_mindspore_change_the_key(monkeypatch):
    before = key()
    monkeypatch.setenv("MS_DEV_SOMETHING", "1")
    assert key() != before


def test_equal_cells_have_equal_keys():
    cells = [Small(), Small()]
    cells[0].w.set_data(Tensor(np.ones((4, 4), np.float32)))
    inputs = (Tensor(np.zeros((2, 4), np.float32)),)
    assert graph_key(cells[0], inputs) == graph_key(cells[1], (Tensor(np.ones((2, 4), np.float32)),))


def test_shared_cells_differ_from_equal_ones():
    shared, separate = nn.CellList([Small()] * 2), nn.CellList([Small(), Small()])
    inputs = (Tensor(np.zeros((2, 4), np.float32)),)
    assert graph_key(shared, inputs) != graph_key(separate, inputs)


@pytest.fixture
def mode():
    """Sets the mode; restores it after the test."""
    before = ms.get_context("mode")
    yield lambda mode: ms.set_context(mode=mode)
    ms.set_context(mode=before)


def test_training_and_hooks_change_the_key(mode):
    # MindSpore registers no hooks in graph mode
    mode(ms.PYNATIVE_MODE)
    inputs = (Tensor(np.zeros((2, 4), np.float32)),)
    hooked = Small()
    before = graph_key(hooked, inputs)
    handle = hooked.register_forward_hook(lambda cell, given, output: output * 2)
    assert graph_key(hooked, inputs) != before
    handle.remove()
    assert graph_key(hooked, inputs) == before
    cell = Small()
    assert graph_key(cell.set_train(), inputs) != graph_key(cell.set_train(False), inputs)


def test_compiling_does_not_change_the_key(mode):
    mode(ms.GRAPH_MODE)
    cell, inputs = GreedyGraph(), (Tensor(np.zeros((1, 4), np.float32)),)
    before = graph_key(cell, inputs)
    cell(*inputs)
    assert graph_key(cell, inputs) == before


def refused(cell: nn.Cell, *inputs) -> str:
    with pytest.raises(NoKeyError) as error:
        graph_key(cell, inputs or (Tensor([1.0]),))
    return str(error.value)


def test_what_cannot_be_covered_is_refused():
    assert "_thread.lock" in refused(Small(scale=threading.Lock()))
    assert "array of objects" in refused(Small(scale=np.array([object()])))
    assert "input of type Parameter" in refused(Small(), Parameter(Tensor([1.0]), name="x"))
    outside = Small()
    outside.function = functools.partial(offset, Parameter(Tensor([1.0]), name="hidden"))
    assert "outside of the Cells" in refused(outside)
    twice = Small()
    twice.inner.weight.name = "w"
    assert "two Parameters of the name w" in refused(twice)


def test_dropout_has_a_key_where_it_drops_nothing():
    dropout = RowDropout(0.1, 4, index=0, counter=new_counter()).set_train(False)
    before = graph_key(dropout, (Tensor([[1.0]]),))
    dropout.width = 8
    assert graph_key(dropout, (Tensor([[1.0]]),)) != before
    assert "outside of the Cells" in refused(dropout.set_train())


@pytest.mark.parametrize("make", [lambda it: NativeRMSNorm(it, 1e-6), lambda it: JointProducts(it, (4, 8))])
def test_an_operator_of_other_sources_has_another_key(make):
    """The path of an installed library does not tell its sources."""
    graphs = [make(SimpleNamespace(path="libkernels.so", digest=digest)) for digest in ("a", "b", "a")]
    first, second, again = (graph_key(graph, (Tensor(np.zeros((2, 4), np.float32)),)) for graph in graphs)
    assert first == again != second
