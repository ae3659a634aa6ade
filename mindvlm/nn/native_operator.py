"""Operators of a graph that are functions of the library of C++ kernels."""

import mindspore as ms
from mindspore import ops

from mindvlm.native.library import Library


def operator(library: Library, function: str, shape, width: int = 0) -> ops.Custom:
    """Returns the operator of a function of the library, whose output is float32.

    Args:
        shape: the shapes of the inputs -> that of the output.
        width: a number that `shape` depends on.
    """
    made = ops.Custom(f"{library.path}:{function}", shape, lambda *_: ms.float32, func_type="aot")
    # PyNative mode keeps output shapes by attributes, which do not include `shape`
    made.add_prim_attr("width", width)
    return made


def first_shape(first, *others):
    return first
