"""Parts of tensors: taken, read from a file, joined again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.checkpoint.blocks import blocks_of
from mindvlm.core.config import build_config
from mindvlm.core.errors import UserError
from mindvlm.parallel import sharding
from mindvlm.parallel.mesh import Mesh, ParallelConfig
from mindvlm.parallel.sharding import ShardedSource, ShardSpec, read_shard


@given(
    axis=st.integers(0, 2),
    count=st.integers(1, 4),
    num_sections=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
)
def test_parts_are_disjoint_cover_all_and_can_be_read_alone(axis, count, num_sections, sizes):
    shape = tuple(size * (count * num_sections if i == axis else 1) for i, size in enumerate(sizes))
    full = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    specs = [ShardSpec(axis=axis, index=i, count=count, num_sections=num_sections) for i in range(count)]
    parts = [spec.take(full) for spec in specs]
    np.testing.assert_array_equal(specs[0].join(parts), full)
    source = MemorySource({"x": full})
    for spec, part in zip(specs, parts, strict=True):
        np.testing.assert_array_equal(read_shard(source, "x", spec), part)
        own = ShardedSource(source, {"x": spec})
        assert own.infos["x"].shape == part.shape
        start, stop = part.size // 3, part.size - part.size // 4
        np.testing.assert_array_equal(own.read_range("x", start, stop), part.reshape(-1)[start:stop])
        assert spec.full_shape(part.shape) == shape


def test_every_section_gives_its_part():
    full = np.arange(12)  # query 0..3, key 4..7, value 8..11
    assert ShardSpec(axis=0, index=1, count=2, num_sections=3).take(full).tolist() == [2, 3, 6, 7, 10, 11]


def test_columns_are_read_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(sharding, "CHUNK_BYTES", 100)
    full = np.arange(60, dtype=np.float32).reshape(10, 6)
    source = MemorySource({"x": full})
    largest = []
    read_range = source.read_range
    monkeypatch.setattr(source, "read_range", lambda name, a, b: largest.append(b - a) or read_range(name, a, b))
    part = read_shard(source, "x", ShardSpec(axis=1, index=2, count=3))
    np.testing.assert_array_equal(part, full[:, 4:])
    assert max(largest) * 4 <= 100
    # of rows no others
    largest.clear()
    read_shard(source, "x", ShardSpec(axis=0, index=1, count=5))
    assert largest == [12]


def test_a_size_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match=r"w is 6 long on axis 0, which 4 tensor-parallel processes cannot"):
        ShardSpec(axis=0, index=0, count=4).check("w", 6)


def test_rows_of_blocks_are_not_divided():
    blocks = blocks_of(np.zeros((4, 2, 18), np.uint8), "q4_0")
    source = MemorySource({"x": RawTensor("q4_0", (4, 64), blocks)})
    halves = ShardedSource(source, {"x": ShardSpec(axis=0, index=1, count=2)})
    assert halves.read("x").data.shape == (2, 2)
    # a product asks for the dtype before it reads
    for stop in (0, 64):
        with pytest.raises(UserError, match="x is q4_0, whose rows 2 tensor-parallel processes cannot divide; give"):
            ShardedSource(source, {"x": ShardSpec(axis=1, index=1, count=2)}).read_range("x", 0, stop)


def test_neighbouring_ranks_share_a_replica():
    meshes = [Mesh(dp=2, tp=3, rank=rank) for rank in range(6)]
    assert [(m.dp_rank, m.tp_rank) for m in meshes] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert meshes[4].dp_ranks == [1, 4] and meshes[4].tp_ranks == [3, 4, 5]
    assert meshes[1].dp_group == meshes[4].dp_group != meshes[3].dp_group


@pytest.mark.parametrize(
    "section, message",
    [
        ({"dp": 0}, "parallel: dp is 0 and tp is 1; expected at least 1 each"),
        ({"zero": 1}, "parallel.zero is 1 but dp is 1"),
        ({"dp": 2, "zero": 3}, "config key 'parallel.zero' is 3; expected 0 or 1 or 2"),
        ({"pp": 2}, "unknown config key 'parallel.pp'; did you mean"),
    ],
)
def test_impossible_sections_are_refused(section, message):
    with pytest.raises(UserError) as error:
        build_config(ParallelConfig, section, "parallel")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "section, num_processes, message",
    [
        ({"dp": 2, "tp": 2}, 2, "dp 2 x tp 2 needs 4 processes but 2 are running; .* --worker_num=4"),
        ({"tp": 2}, 1, "dp 1 x tp 2 needs 2 processes but only 1 is running; .* --worker_num=2"),
        ({}, 2, "dp 1 x tp 1 needs 1 process but 2 are running; .* without msrun"),
    ],
)
def test_another_number_of_processes_is_refused(section, num_processes, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**section).check_world_size(num_processes)


def test_the_right_number_of_processes_is_accepted():
    ParallelConfig(dp=2, tp=4).check_world_size(8)
