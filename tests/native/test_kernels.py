"""The C++ kernels against NumPy, for every instruction set that this machine has."""

import ctypes
import platform
import subprocess
import threading

import numpy as np
import pytest

from mindvlm.checkpoint import RawTensor
from mindvlm.checkpoint.blocks import blocks_of, widen_blocks
from mindvlm.core.weight_formats import find_block
from mindvlm.native.build import find_compiler
from mindvlm.native.library import BLOCK, Matrix
from tests.native.operators import call

pytest_plugins = ("tests.native.operators",)

SHAPES = [(1, 32), (37, 64), (100, 96), (64, 2080), (7, 1056)]
BLOCK_FORMATS = ("q8_0", "q8_c", "q4_0", "q4_K")
NUM_ROWS = [1, 2, 3, 5, 9, 14, 31, 300]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(block_format: str, width: int) -> str:
    """The dtype of rows of a width."""
    return f"q8_c[{width}]" if block_format == "q8_c" else block_format


def dequantized(blocks: np.ndarray, dtype: str) -> np.ndarray:
    """The weights (rows, cols) of stored blocks."""
    if dtype == "q4_K":
        return widen_blocks(blocks_of(blocks, dtype), dtype)
    if dtype == "q8_c":
        scales, values = blocks[:, 0, :4].copy().view(np.float32), blocks[:, 0, 4:].view(np.int8)
        return scales * values
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    if dtype == "q8_0":
        values = blocks[..., 2:].view(np.int8).astype(np.float32)
    else:
        values = np.concatenate((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), -1).astype(np.float32) - 8
    return (values * scale).reshape(len(blocks), -1)


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """x with every 32 values rounded to int8."""
    blocks = x.reshape(len(x), -1, BLOCK)
    top = np.abs(blocks).max(-1, keepdims=True)
    return (np.rint(blocks * (np.float32(127) / top)) * (top / np.float32(127))).reshape(x.shape)


def make(library, weights: np.ndarray, dtype: str) -> tuple[Matrix, np.ndarray]:
    """A matrix and the float32 weights that it stands for."""
    if dtype in BLOCK_FORMATS:
        blocks = library.quantize(weights, stored(dtype, weights.shape[1]))
        matrix = Matrix.of_blocks(library, stored(dtype, weights.shape[1]), weights.shape)
        matrix.pack(0, blocks)
        return matrix, dequantized(blocks, dtype)
    raw = RawTensor("float32", weights.shape, weights).cast(dtype)
    return Matrix.of_floats(library, raw.data, dtype), raw.to_float32()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *BLOCK_FORMATS])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_and_rows(library, dtype, threads):
    shapes = SHAPES if dtype in BLOCK_FORMATS else [*SHAPES, (33, 37), (5, 3), (300, 259)]
    if dtype == "q4_K":
        shapes = [(1, 256), (37, 512), (64, 2048)]
    library.call("mindvlm_set_num_threads", threads)
    for shape in shapes:
        matrix, weights = make(library, noise(*shape), dtype)
        for index in (0, shape[0] - 1):
            # a minimum is subtracted with or without rounding the product before
            largest = 1e-6 if dtype == "q4_K" else 0
            np.testing.assert_allclose(matrix.row(index), weights[index], rtol=0, atol=largest)
        for count in NUM_ROWS:
            x = noise(count, shape[1], seed=count)
            seen = rounded_rows(x) if dtype in BLOCK_FORMATS else x
            expected = seen.astype(np.float64) @ weights.T.astype(np.float64)
            np.testing.assert_allclose(matrix.multiply(x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", *BLOCK_FORMATS])
def test_a_row_of_many_has_the_same_bits_whatever_the_others_are(library, dtype):
    """Prompts are prefilled in blocks of 64 tokens, in any number and order."""
    library.call("mindvlm_set_num_threads", 3)
    matrix, _ = make(library, noise(300, 512), dtype)
    x = noise(1024, 512, seed=1)
    whole = matrix.multiply(x)
    for count, first in ((64, 0), (64, 960), (128, 64), (320, 192), (576, 448)):
        np.testing.assert_array_equal(matrix.multiply(x[first : first + count]), whole[first : first + count])


def test_float16_keeps_signs_subnormal_numbers_infinity_and_nan(library):
    numbers = [0.0, -0.0, 6e-8, -6e-8, 1e-5, 65504.0, -65504.0, 1.0, np.inf, -np.inf, np.nan]
    # as columns of a vector, and as those that no vector holds
    values = np.array([numbers * 3], np.float16)
    matrix = Matrix.of_floats(library, values, "float16")
    np.testing.assert_array_equal(matrix.row(0), values[0].astype(np.float32))
    single = np.array(numbers, np.float16)[:, None].repeat(37, 1)
    one = np.eye(37, dtype=np.float32)[:1]
    products = Matrix.of_floats(library, single, "float16").multiply(one)[0]
    # infinity times 0
    expected = np.where(np.isfinite(single[:, 0]), single[:, 0], np.nan)
    np.testing.assert_array_equal(products, expected.astype(np.float32))


@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
def test_blocks_times_tiny_and_infinite_numbers(library, dtype):
    blocks = library.quantize(np.ones((16, 256), np.float32), stored(dtype, 256))
    matrix = Matrix.of_blocks(library, stored(dtype, 256), (16, 256))
    matrix.pack(0, blocks)
    x = np.zeros((4, 256), np.float32)
    x[0], x[1, 7], x[2, 9], x[3] = 1e-40, np.inf, np.nan, 1.0
    y = matrix.multiply(x)
    assert np.abs(y[0]).max() < 1e-36 and np.isnan(y[1:3]).all()
    np.testing.assert_allclose(y[3], 256, rtol=0.02)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the mode is set by an x86 instruction")
def test_subnormal_weights_count_in_threads_that_read_such_numbers_as_zero(library, tmp_path):
    """MindSpore's threads do, and take some of the tasks."""
    source, compiled = tmp_path / "mode.cpp", tmp_path / "mode.so"
    source.write_text(
        '#include <xmmintrin.h>\nextern "C" void skip_subnormals() { _mm_setcsr(_mm_getcsr() | 0x8040); }\n'
    )
    subprocess.run([*find_compiler(), "-shared", "-fPIC", source, "-o", compiled], check=True)
    skip_subnormals = ctypes.CDLL(compiled).skip_subnormals
    library.call("mindvlm_set_num_threads", 3)
    # 37 columns leave some that no vector holds
    weights = (noise(2000, 37) * 1e-6).astype(np.float16)
    matrix, x = Matrix.of_floats(library, weights, "float16"), noise(1, 37, seed=1)
    ids, handle = np.array([3, 1999], np.int32), np.array([matrix.handle], np.int64)
    expected, products, rows = matrix.multiply(x), [], []

    def use():
        skip_subnormals()
        products.extend(matrix.multiply(x) for _ in range(5))
        rows.append(call(library, "MindvlmRows", (2, 37), ids, handle))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(rows[0], weights[ids].astype(np.float32))
    assert np.abs(expected).min() > 0
    for product in products:
        np.testing.assert_array_equal(product, expected)


@pytest.mark.parametrize("block_format", ["q4_0", "q8_c"])
def test_packing_by_parts_equals_packing_at_once(library, block_format):
    dtype = stored(block_format, 64)
    blocks = library.quantize(noise(50, 64), dtype)
    whole, parts = (Matrix.of_blocks(library, dtype, (50, 64)) for _ in range(2))
    whole.pack(0, blocks)
    for first in range(0, 50, 2 * parts.row_step):
        parts.pack(first, blocks[first : first + 2 * parts.row_step])
    x = noise(3, 64)
    np.testing.assert_array_equal(whole.multiply(x), parts.multiply(x))


@pytest.mark.parametrize(("dtype", "largest"), [("q8_0", 0.006), ("q8_c", 0.009), ("q4_0", 0.09), ("q4_K", 0.08)])
def test_the_error_of_rounded_weights(library, dtype, largest):
    weights = noise(64, 256)
    error = dequantized(library.quantize(weights, stored(dtype, 256)), dtype) - weights
    assert 0 < np.sqrt((error**2).mean()) < largest


@pytest.mark.parametrize("dtype", ["q4_0", "q4_K"])
def test_important_columns_are_rounded_with_less_error(library, dtype):
    weights, importance = noise(64, 256), np.ones(256, np.float32)
    importance[::4] = 100.0
    errors = [
        np.abs(dequantized(library.quantize(weights, dtype, given), dtype) - weights)[:, ::4].mean()
        for given in (None, importance)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_zero_weights_stay_zero(library):
    for dtype in BLOCK_FORMATS:
        blocks = library.quantize(np.zeros((2, 256), np.float32), stored(dtype, 256))
        np.testing.assert_array_equal(dequantized(blocks, dtype), 0)


def test_a_row_of_channels_is_rounded_to_multiples_of_its_scale(library):
    """Exact values, read by the kernel as by NumPy; a row too small for an inverse of its scale becomes 0."""
    weights = np.array([[2.0, -127.0, 0.4, 0.6, *[1.0] * 28], [254.0, -3.0, 1.1, 0.9, *[0.0] * 28], [1e-38] * 32], "f")
    dtype = stored("q8_c", 32)
    blocks = library.quantize(weights, dtype)
    expected = [[2, -127, 0, 1, *[1] * 28], [254, -4, 2, 0, *[0] * 28], [0] * 32]
    np.testing.assert_array_equal(dequantized(blocks, "q8_c"), expected)
    np.testing.assert_array_equal(widen_blocks(blocks_of(blocks, dtype), dtype), expected)
    matrix = Matrix.of_blocks(library, dtype, weights.shape)
    matrix.pack(0, blocks)
    np.testing.assert_array_equal([matrix.row(index) for index in range(3)], expected)
    assert find_block(dtype).num_bytes == blocks.shape[-1] == 36 and matrix.num_bytes == 3 * 36


def test_blocks_of_4_bits_fit_ranges_away_from_zero(library):
    """A part between two positive, two negative or equal numbers."""
    weights = np.concatenate(
        [np.linspace(a, b, 32) for a, b in ((2, 3), (-3, -2), (-1, 1), (2, 2), (-2, -2))] + [[0] * 96]
    )
    found = dequantized(library.quantize(weights[None], "q4_K"), "q4_K")[0]
    # a positive minimum does not exist, so the range of the first part begins at 0
    assert (np.abs(found - weights).reshape(-1, 32).max(1) <= [0.11, 0.06, 0.08, 0.02, 0.04, 0, 0, 0]).all()


def test_blocks_are_those_of_ggml(library):
    quants = pytest.importorskip("gguf").quants
    for dtype in set(BLOCK_FORMATS) - {"q8_c"}:
        blocks = library.quantize(noise(3, 512), dtype)
        kind = quants.GGMLQuantizationType[dtype.upper()]
        expected = quants.dequantize(blocks.reshape(3, -1), kind)
        np.testing.assert_allclose(dequantized(blocks, dtype), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *BLOCK_FORMATS])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_nonfinite_inputs_do_not_become_numbers(library, dtype, wrong):
    matrix, _ = make(library, noise(5, 256), dtype)
    for column in (0, 37, 255):
        x = noise(3, 256)
        x[1, column] = wrong
        found = np.isfinite(matrix.multiply(x))
        assert found[[0, 2]].all()
        assert not found[1].any()
