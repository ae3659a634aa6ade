"""Operators of a graph that are functions of the library of C++ kernels."""

import mindspore as ms
from mindspore import ops

from mindvlm.native.library import Library


def operator(
    library: Library, function: str, shape, width: int | tuple[int, ...] = 0, num_outputs: int | None = None
) -> ops.Custom:
    """Returns the operator of a function of the library, whose outputs are float32.

    Args:
        shape: the shapes of the inputs -> that of the output, or a tuple of those of the outputs.
        width: numbers that `shape` depends on.
        num_outputs: number of outputs that the operator returns as a tuple; None for one output without a tuple.
    """
    dtypes = ms.float32 if num_outputs is None else (ms.float32,) * num_outputs
    made = ops.Custom(f"{library.path}:{function}", shape, lambda *_: dtypes, func_type="aot")
    # PyNative mode keeps output shapes by attributes, which do not include `shape`
    made.add_prim_attr("width", width)
    # a graph on disk must not call a function whose arguments have changed
    made.add_prim_attr("sources", library.digest)
    return made


def first_shape(first, *others):
    return first
