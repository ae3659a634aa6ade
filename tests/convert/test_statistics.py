"""Statistics of what passes: equal for equal values, however they are stored and read, and only of whole tensors."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, RawTensor, write_checkpoint
from mindvlm.convert.statistics import StatisticsTap
from tests.checkpoint.samples import DTYPES, random_tensor
from tests.weights.lora.adapters import source_of


def statistics_of(values, dtype: str | None = None, chunk_bytes: int = 1 << 20):
    tap = StatisticsTap(MemorySource({"a": RawTensor.from_array(np.asarray(values), dtype)}))
    for _ in tap.chunks("a", chunk_bytes):
        pass
    return tap.statistics["a"]


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 300), min_size=1, max_size=3), st.integers(1, 400000))
def test_the_numbers_are_those_of_torch(dtype, shape, chunk_bytes):
    shape = tuple(shape)[: 3 if math.prod(shape) < 300000 else 1]
    tensor = random_tensor(dtype, shape)
    tap = StatisticsTap(source_of({"a": tensor}))
    for chunk, other in zip(
        tap.chunks("a", chunk_bytes), source_of({"a": tensor}).chunks("a", chunk_bytes), strict=True
    ):
        assert np.array_equal(chunk, other)
    found, wide = tap.statistics["a"], tensor.double()
    assert found.norm == pytest.approx(float(wide.norm()), rel=1e-12)
    assert found.sum == pytest.approx(float(wide.sum()), rel=1e-12, abs=1e-9 * (1 + found.norm))
    assert found.num_nonfinite == 0
    if tensor.numel():
        assert (found.min, found.max) == (float(wide.min()), float(wide.max()))
    else:
        assert (found.norm, found.sum, found.min, found.max) == (0, 0, None, None)


@given(st.integers(1, 200000), st.integers(8, 300000), st.integers(8, 300000))
def test_chunks_do_not_matter_to_the_last_bit(size, first, second):
    values = np.random.default_rng(size).normal(size=size)
    assert statistics_of(values, chunk_bytes=first) == statistics_of(values, chunk_bytes=second)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_equal_values_in_another_dtype_have_equal_statistics(dtype):
    """Every value of the narrow dtype, the infinite ones and NaN included, and what it is as float32."""
    bits = np.arange(65536, dtype=np.uint16)
    narrow = torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype])
    narrow = torch.cat([narrow, narrow[:1000]])
    found = []
    for tensor in (narrow, narrow.float(), narrow.double()):
        tap = StatisticsTap(source_of({"a": tensor}))
        tap.read("a")
        found.append(tap.statistics["a"])
    assert found[0] == found[1] == found[2]
    finite = narrow[narrow.isfinite()].double()
    assert found[0].num_nonfinite == len(narrow) - len(finite) > 0
    assert found[0].max == float(finite.max()) and found[0].min == float(finite.min())


def test_only_finite_elements_are_counted():
    found = statistics_of(np.array([3.0, np.nan, -4.0, np.inf, -np.inf], np.float32))
    assert (found.norm, found.sum, found.min, found.max, found.num_nonfinite) == (5, -1, -4, 3, 3)
    none = statistics_of(np.array([np.nan, np.inf]))
    assert (none.norm, none.sum, none.min, none.max, none.num_nonfinite) == (0, 0, None, None, 2)


def test_float64_beyond_its_range_is_told_as_infinite():
    found = statistics_of(np.full(200000, 1e308))
    assert (found.norm, found.sum, found.max, found.num_nonfinite) == (math.inf, math.inf, 1e308, 0)
    both = statistics_of(np.repeat([1.7e308, -1.7e308], 65536))
    assert math.isnan(both.sum)


def tap_of(**shapes) -> StatisticsTap:
    return StatisticsTap(MemorySource({name: np.arange(size, dtype=np.float32) for name, size in shapes.items()}))


@pytest.mark.parametrize(
    "reads",
    [
        [(0, 5)],
        [(5, 10)],
        [(0, 5), (6, 10)],
        [(0, 5), (4, 10)],
        [(5, 10), (0, 5)],
        [(0, 5), (7, 8), (5, 10)],
        [(0, 5), (0, 5)],
        [(0, 0)],
        [],
    ],
)
def test_a_tensor_not_read_whole_and_in_order_has_none(reads):
    tap = tap_of(a=10)
    for start, stop in reads:
        assert np.array_equal(tap.read_range("a", start, stop), np.arange(start, stop))
    assert not tap.statistics


@pytest.mark.parametrize(
    "reads",
    [
        [(0, 10)],
        [(0, 5), (5, 10)],
        [(0, 5), (5, 5), (5, 10)],
        [(3, 4), (0, 5), (0, 10)],
        [(0, 5), (6, 10), (0, 9), (9, 10)],
        [(0, 10), (0, 10), (2, 3)],
    ],
)
def test_one_pass_in_order_is_enough(reads):
    tap = tap_of(a=10)
    for start, stop in reads:
        tap.read_range("a", start, stop)
    assert tap.statistics["a"].sum == 45


def test_tensors_read_in_turns_have_none_until_they_are_read_whole():
    tap = tap_of(a=10, b=10, empty=0)
    for start in (0, 5):
        for name in ("a", "b"):
            tap.read_range(name, start, start + 5)
    assert set(tap.statistics) == {"empty"}
    tap.read("b")
    assert set(tap.statistics) == {"b", "empty"}


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_written_file_leaves_all_of_them(tmp_path, ending):
    tensors = {
        "scalar": np.array(2.0),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False, True]),
        "large": np.ones((5 << 20,), np.float32),
    }
    tap = StatisticsTap(MemorySource(tensors))
    write_checkpoint(tmp_path / f"out{ending}", tap)
    assert set(tap.statistics) == set(tensors)
    assert tap.statistics["large"].sum == 5 << 20 and tap.statistics["flags"].sum == 2
    assert tap.statistics["scalar"].min == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_keeps_up_with_a_disk(dtype):
    """1 GB/s is what it reaches alone on a core; half of a quarter of that is a defect and not a busy machine."""
    source = source_of({"a": random_tensor(dtype, (8 << 20,))})
    best = math.inf
    for _ in range(3):
        tap = StatisticsTap(source)
        started = time.process_time()
        tap.read("a")
        best = min(best, time.process_time() - started)
    assert source.infos["a"].num_bytes / best > 125e6
