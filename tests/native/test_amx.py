"""Products by the tiles of AMX. Their instructions are emulated, for machines that have AVX-512 without them."""

import shutil

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.native.build import INSTRUCTION_SET_OPTIONS, OPTIONS, SOURCES, find_compiler, knows, run
from mindvlm.native.library import BLOCK, Library, open_library
from tests.native.operators import is_here
from tests.native.test_kernels import BLOCK_FORMATS, make, noise

TILE = 16
"""Rows and outputs of a tile."""


@pytest.fixture(scope="module")
def library(tmp_path_factory, request) -> Library:
    """The library with emulated tiles; the files without any are not compiled again."""
    found, options = open_library(), INSTRUCTION_SET_OPTIONS["x86_64"]["kernels_amx.cpp"]
    if found is None or not is_here(found, "avx512") or not knows(find_compiler(), options):
        pytest.skip("there is no AVX-512, or no compiler that knows AMX")
    folder = tmp_path_factory.mktemp("amx")
    # the first library of a process with this path has no tiles
    rest = shutil.copy(found.path, folder / "rest.so")
    command = [*find_compiler(), *OPTIONS, *options, "-include", str(request.path.with_name("emulated_tiles.h"))]
    sources = [str(SOURCES / name) for name in ("library.cpp", "kernels_amx.cpp")]
    run([*command, '-DMINDVLM_DIGEST=""', "-shared", *sources, rest, "-o", str(folder / "tiles.so")])
    emulated = Library(folder / "tiles.so")
    emulated.choose(None)
    return emulated


@pytest.mark.parametrize("variable", ["EMULATED_REFUSAL", "EMULATED_WITHOUT_INT8"])
def test_tiles_are_used_where_processor_and_system_have_them(library, monkeypatch, variable):
    assert library.choose(None) == "amx"
    monkeypatch.setenv(variable, "1")
    assert library.choose(None) == "avx512"
    with pytest.raises(UserError, match="MINDVLM_NATIVE is 'amx', which this processor does not have"):
        library.choose("amx")


@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_products_have_the_bits_of_avx512(library, dtype, threads):
    library.call("mindvlm_set_num_threads", threads)
    for outputs, cols in [(1, 256), (37, 512), (300, 768), *([] if dtype == "q4_K" else [(16, 32), (47, 96)])]:
        matrix, _ = make(library, noise(outputs, cols), dtype)
        for count in (1, 15, 16, 17, 33, 64):
            x = noise(count, cols, seed=count)
            x[count // 2, 5], x[-1] = np.nan, 0
            library.choose("avx512")
            expected = matrix.multiply(x)
            library.choose("amx")
            np.testing.assert_array_equal(matrix.multiply(x).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
def test_rows_are_multiplied_by_tiles_if_they_fill_one(library, dtype):
    library.call("mindvlm_set_num_threads", 1)
    library.choose("amx")
    outputs, cols = 37, 512
    matrix, _ = make(library, noise(outputs, cols), dtype)
    for count in (1, 15, 16, 17, 33):
        library.call("take_num_products")
        matrix.multiply(noise(count, cols))
        expected = count // TILE * -(-outputs // TILE) * (cols // BLOCK)
        # -1 if a thread kept the tiles, which the system would then save at every change of threads
        assert library.call("take_num_products") == expected
