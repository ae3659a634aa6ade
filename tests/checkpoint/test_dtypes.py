"""Casts between floating dtypes equal torch's, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.checkpoint.dtypes import (
    FLOAT_DTYPES,
    bfloat16_to_float32,
    cast_storage,
    float32_to_bfloat16,
    has_nonfinite,
    overflows,
)

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def to_torch(data: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def random_bits(dtype: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 256, 80_000, dtype=np.uint8)
    data = bits.view({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}[dtype])
    return data.copy()


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_cast_equals_torch(source, target):
    data = random_bits(source)
    result = to_torch(cast_storage(data, source, target), target)
    expected = to_torch(data, source).to(TORCH[target])
    assert torch.equal(result.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(result[number], expected[number])


def test_bfloat16_survives_float32_and_back():
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    back = float32_to_bfloat16(bfloat16_to_float32(bits))
    nan = (bits & 0x7FFF) > 0x7F80
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(bfloat16_to_float32(back[nan])).all()


@given(st.floats(width=32))
def test_bfloat16_is_the_nearest(value):
    result = bfloat16_to_float32(float32_to_bfloat16(np.array([value], np.float32)))
    expected = torch.tensor([value]).to(torch.bfloat16).float().numpy()
    assert np.array_equal(result, expected, equal_nan=True)


def test_scalars_keep_their_shape():
    assert float32_to_bfloat16(np.array(1.5, np.float32)).shape == ()


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(65504.0, "float16", False), (70000.0, "float16", True), (np.inf, "float16", False), (3.4e38, "bfloat16", True)],
)
def test_overflow_is_told_from_infinity(value, dtype, expected):
    data = np.array([0.0, value], np.float32)
    assert overflows(data, "float32", cast_storage(data, "float32", dtype), dtype) is expected


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_nonfinite_values_are_found_in_every_float(dtype):
    largest = {"float16": 65504.0, "bfloat16": 3.3e38}.get(dtype, float(np.finfo(np.float32).max))
    finite = np.float64([0.0, -0.0, 1e-40, -3.0, largest, -largest])
    assert not has_nonfinite(cast_storage(finite, "float64", dtype), dtype)
    assert not has_nonfinite(finite[:0], dtype)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        data = cast_storage(np.append(finite, value), "float64", dtype)
        assert has_nonfinite(data, dtype)
    assert not has_nonfinite(np.int64([-1, 2**62]), "int64") and not has_nonfinite(np.bool_([True]), "bool")
