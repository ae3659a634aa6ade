"""Products and roundings beside those of ggml itself, whose libraries the package `libggml-python` holds."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from mindvlm.native.library import Matrix, open_library
from tests.native.operators import IS_ARM, is_here
from tests.native.test_kernels import noise

TYPES = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "bfloat16": 30}
"""Numbers of ggml's types."""
MEMORY = 64 << 20


class InitParameters(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The functions of ggml that multiply a matrix on the CPU."""

    def __init__(self, folder: Path):
        self.base, self.cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so")) for name in ("base", "cpu"))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for name, arguments in {
            "ggml_init": (InitParameters,),
            "ggml_new_tensor_2d": (pointer, ctypes.c_int, size, size),
            "ggml_get_data": (pointer,),
            "ggml_mul_mat": (pointer, pointer, pointer),
            "ggml_new_graph": (pointer,),
        }.items():
            function = getattr(self.base, name)
            function.restype, function.argtypes = pointer, arguments
        self.base.ggml_build_forward_expand.argtypes = (pointer, pointer)
        self.base.ggml_free.argtypes = (pointer,)
        self.base.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, size, size, size, pointer)
        self.cpu.ggml_graph_compute_with_ctx.argtypes = (pointer, pointer, ctypes.c_int)

    def quantize(self, weights: np.ndarray, dtype: str, num_bytes: int) -> np.ndarray:
        """Returns weights (rows, cols) rounded to blocks, as bytes (rows, bytes of a row)."""
        rows, cols = weights.shape
        blocks = np.empty((rows, num_bytes), np.uint8)
        self.base.ggml_quantize_chunk(TYPES[dtype], weights.ctypes.data, blocks.ctypes.data, 0, rows, cols, None)
        return blocks

    def multiply(self, stored: np.ndarray, dtype: str, x: np.ndarray) -> np.ndarray:
        """Returns x W^T (N, rows) for x (N, cols) float32 and the stored rows of W."""
        context = self.base.ggml_init(InitParameters(MEMORY, None, False))
        w = self.base.ggml_new_tensor_2d(context, TYPES[dtype], x.shape[1], len(stored))
        rows = self.base.ggml_new_tensor_2d(context, TYPES["float32"], x.shape[1], len(x))
        for tensor, values in ((w, stored), (rows, x)):
            ctypes.memmove(self.base.ggml_get_data(tensor), values.ctypes.data, values.nbytes)
        y = self.base.ggml_mul_mat(context, w, rows)
        graph = self.base.ggml_new_graph(context)
        self.base.ggml_build_forward_expand(graph, y)
        assert self.cpu.ggml_graph_compute_with_ctx(context, graph, 1) == 0
        out = np.empty((len(x), len(stored)), np.float32)
        ctypes.memmove(out.ctypes.data, self.base.ggml_get_data(y), out.nbytes)
        self.base.ggml_free(context)
        return out


@pytest.fixture(scope="module")
def library():
    return open_library() or pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="module")
def ggml(library) -> Ggml:
    package = pytest.importorskip("libggml")
    if not IS_ARM and not is_here(library, "avx2"):
        pytest.skip("this processor does not have AVX2, which the package's libraries use")
    return Ggml(Path(package.__file__).parent / "lib64")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_products_are_those_of_ggml(ggml, library, dtype, num_rows):
    """Of numbers that need no rounding: ggml rounds x to 16 bits or to blocks of 256, and their scales to float16."""
    weights = noise(48, 512)
    x = np.random.default_rng(1).integers(-126, 127, (num_rows, 512)).astype(np.float32)
    x[:, ::32] = 127
    if dtype.startswith("q"):
        blocks = library.quantize(weights, dtype)
        matrix = Matrix.of_blocks(library, dtype, weights.shape)
        matrix.pack(0, blocks)
        stored = blocks.reshape(len(weights), -1)
    else:
        stored = weights.astype(np.float16) if dtype == "float16" else weights
        stored = (weights.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else stored
        matrix = Matrix.of_floats(library, stored, dtype)
    expected = ggml.multiply(stored, dtype, x)
    error = np.abs(matrix.multiply(x) - expected).max() / np.abs(expected).max()
    assert error < 1e-6


def test_weights_are_rounded_to_8_bits_as_in_ggml(ggml, library):
    weights = noise(7, 512)
    ours = library.quantize(weights, "q8_0").reshape(7, -1)
    np.testing.assert_array_equal(ours, ggml.quantize(weights, "q8_0", ours.shape[1]))


@pytest.mark.parametrize("dtype", ["q4_0", "q4_K"])
def test_4_bits_leave_no_more_error_than_in_ggml(ggml, library, dtype):
    weights, one = noise(64, 512), np.eye(512, dtype=np.float32)
    ours = library.quantize(weights, dtype).reshape(64, -1)
    theirs = ggml.quantize(weights, dtype, ours.shape[1])
    errors = [np.square(ggml.multiply(blocks, dtype, one).T - weights).mean() for blocks in (ours, theirs)]
    assert errors[0] <= 1.01 * errors[1]
