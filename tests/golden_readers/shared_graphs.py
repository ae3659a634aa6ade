"""Graphs that several runs of a case share, because compiling takes nearly all of the time.

The graph of a model on the C++ kernels depends neither on the instruction set nor on the format of float weights.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from mindspore import Tensor, nn

from mindvlm.generation.graph_cache import exchange_of_process
from mindvlm.generation.graph_key import NoKeyError, graph_key


@contextmanager
def shared_graphs() -> Iterator[None]:
    """Inside the block, a Cell reads its graph if an equal one was compiled, instead of compiling it again."""
    stored: dict[str, bytes] = {}
    shapes_of: weakref.WeakKeyDictionary[nn.Cell, set] = weakref.WeakKeyDictionary()
    exchange, compile_anew = exchange_of_process(), nn.Cell.compile

    def compile_shared(cell: nn.Cell, *inputs, **options) -> None:
        # MindSpore asks before each call; a graph of the library's own cache is on its way in the folder
        shapes = (cell.training, tuple((x.shape, x.dtype) for x in inputs if isinstance(x, Tensor)))
        is_compiled = shapes in shapes_of.setdefault(cell, set())
        shapes_of[cell].add(shapes)
        try:
            key = None if is_compiled or exchange.folder.exists() else graph_key(cell, inputs)
        except NoKeyError:
            key = None
        if key is None:
            compile_anew(cell, *inputs, **options)
        elif made := exchange.compile(cell, inputs, stored.get(key)):
            stored[key] = made

    nn.Cell.compile = compile_shared
    try:
        yield
    finally:
        nn.Cell.compile = compile_anew
