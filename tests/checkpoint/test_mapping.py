"""Tensors over a mapping of their file."""

import os
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, NonFiniteError, RawTensor, open_checkpoint, write_checkpoint
from mindvlm.nn.native_products import NativeProduct
from mindvlm.nn.parameters import read_rows
from mindvlm.nn.products import DenseProduct

SHAPE = (700, 1024)


@pytest.fixture
def file(tmp_path):
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    half = RawTensor("float32", SHAPE, values).cast("float16")
    tensors = {"half": half, "wide": values, "small": values[0], "blocks": blocks()}
    write_checkpoint(tmp_path / "a.safetensors", MemorySource(tensors))
    return tmp_path / "a.safetensors"


def blocks() -> RawTensor:
    bits = np.random.default_rng(1).integers(0, 128, (*SHAPE[:1], 64, 34), np.uint8)
    return RawTensor("q8_0", (SHAPE[0], 2048), bits.view("V34")[..., 0])


def test_large_tensors_are_mapped_and_equal_those_that_are_read(file):
    with open_checkpoint(file) as read, open_checkpoint(file, mapped=True) as mapped:
        for name, info in read.infos.items():
            expected, found = read.read(name).data, mapped.read(name).data
            assert found.tobytes() == expected.tobytes() and found.dtype == expected.dtype
            assert found.flags.writeable == (name == "small")
            if name != "small":
                part = mapped.read_range(name, 32 * 7, info.num_elements - 32)
                np.testing.assert_array_equal(
                    part, found.reshape(-1)[7 * 32 * found.size // info.num_elements :][: len(part)]
                )
    # arrays outlive the checkpoint, and the name of the file
    with open_checkpoint(file, mapped=True) as mapped:
        kept, expected = mapped.read("wide").data, mapped.read("wide").data.copy()
    os.rename(file, file.with_name("b"))
    np.testing.assert_array_equal(kept, expected)


def test_arrays_keep_no_file_open_and_end_their_mapping(file):
    def num_mappings():
        return Path("/proc/self/maps").read_text().count(str(file))

    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(file, mapped=True) as mapped:
        kept = [mapped.read(name).data for name in ("half", "wide", "blocks") for _ in range(20)]
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert num_mappings() and all(array.any() for array in kept)
    part = kept[0][3:]
    del kept
    assert num_mappings() == 1 and part.any()
    del part
    assert num_mappings() == 0


def test_matrices_of_the_kernels_stay_mapped_and_parameters_are_copied(file, kernels):
    with open_checkpoint(file, mapped=True) as mapped:
        seen = []

        def read(start, stop):
            seen.append(read_rows(mapped, "half", start, stop))
            return seen[-1]

        native = NativeProduct(SHAPE, ms.float32, library=kernels, weight_format="auto")
        native.load(read)
        assert np.shares_memory(native.stored.values, seen[-1].data)
        dense = DenseProduct(SHAPE, ms.float32)
        dense.load(lambda start, stop: read_rows(mapped, "wide", start, stop))
        before = dense.weight.asnumpy().copy()
        dense.weight.set_data(dense.weight + 1)
        dense.weight[0, 0] = 5.0
        np.testing.assert_array_equal(mapped.read("wide").data, before)


def test_nan_is_found_in_a_mapping(file):
    content = bytearray(file.read_bytes())
    with open_checkpoint(file) as checkpoint:
        segment = checkpoint.tensors["wide"].segments[0]
    content[segment.offset + 3000 : segment.offset + 3004] = np.float32(np.nan).tobytes()
    file.write_bytes(content)
    with open_checkpoint(file, require_finite=True, mapped=True) as mapped, pytest.raises(NonFiniteError, match="wide"):
        mapped.read("wide")
