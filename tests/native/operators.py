"""The library of kernels with each instruction set, and calls of its operators without a graph."""

import ctypes
import platform

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.core.host_cpus import num_threads
from mindvlm.native.library import INSTRUCTION_SETS, Library, open_library

IS_ARM = platform.machine() == "aarch64"
SETS = [name for name in INSTRUCTION_SETS if name == "portable" or (name in ("dotprod", "neon")) == IS_ARM]
"""Instruction sets of this architecture."""


def is_here(library: Library, name: str) -> bool:
    """Returns whether this machine has an instruction set."""
    before = library.instruction_set
    try:
        library.choose(name)
    except UserError:
        return False
    library.choose(before)
    return True


@pytest.fixture(params=SETS)
def library(request):
    """The library with each instruction set that this machine has."""
    found = open_library()
    if found is None:
        pytest.skip("there is no C++ compiler")
    if not is_here(found, request.param):
        pytest.skip(f"this processor does not have {request.param}")
    before = found.instruction_set
    found.choose(request.param)
    yield found
    found.choose(before)
    found.call("mindvlm_set_num_threads", num_threads())


def call(library: Library, function: str, shape: tuple[int, ...], *inputs: np.ndarray, num_outputs: int = 1):
    """Returns the float32 output of an operator, or several of one shape."""
    outputs = [np.full(shape, np.nan, np.float32) for _ in range(num_outputs)]
    arrays = [*(np.ascontiguousarray(array) for array in inputs), *outputs]
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    num_dims = (ctypes.c_int * len(arrays))(*(array.ndim for array in arrays))
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    rows = (ctypes.POINTER(ctypes.c_int64) * len(arrays))(
        *(ctypes.cast(row, ctypes.POINTER(ctypes.c_int64)) for row in shapes)
    )
    operator = getattr(ctypes.CDLL(str(library.path)), function)
    assert operator(len(arrays), pointers, num_dims, rows, None, None, None) == 0
    return outputs if num_outputs > 1 else outputs[0]
