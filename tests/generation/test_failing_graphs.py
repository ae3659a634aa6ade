"""Compiled graphs after an operator has raised an error, such as a lack of memory."""

import ctypes
import subprocess

import pytest
from mindspore import nn, ops

from mindvlm.api import load
from mindvlm.native.build import CompilerError, find_compiler
from tests.tiny_vary import picture, write_tiny_vary

OPERATOR = r"""
#include <cstdint>
#include <cstring>
#include <new>
static int calls_left = 0;
extern "C" void fail_at_call(int number) { calls_left = number; }
extern "C" int Copy(int, void** data, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  if (calls_left > 0 && --calls_left == 0) throw std::bad_alloc();
  int64_t size = 4;
  for (int i = 0; i < num_dims[0]; ++i) size *= shapes[0][i];
  std::memcpy(data[1], data[0], size);
  return 0;
}
"""


class Copied(nn.Cell):
    """Copies the float32 output of a Cell with the operator of a library."""

    def __init__(self, cell: nn.Cell, library: str):
        super().__init__()
        self.cell = cell
        self.copy = ops.Custom(f"{library}:Copy", lambda shape: shape, lambda dtype: dtype, func_type="aot")

    def construct(self, *inputs):
        return self.copy(self.cell(*inputs))


@pytest.fixture(scope="module")
def operator(tmp_path_factory) -> str:
    """The path of a library with an operator that lacks memory at one of its calls."""
    folder = tmp_path_factory.mktemp("operator")
    (folder / "copy.cpp").write_text(OPERATOR)
    try:
        compiler = find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))
    subprocess.run([*compiler, "-shared", "-fPIC", folder / "copy.cpp", "-o", folder / "copy.so"], check=True)
    return str(folder / "copy.so")


@pytest.fixture(scope="module")
def model(operator, tmp_path_factory):
    """A compiled model whose vision graph calls the operator once, and its decoder too."""
    loaded = load(write_tiny_vary(tmp_path_factory.mktemp("model"), mode="graph"), cache=False)
    vary = loaded.model
    vary.mm_projector = Copied(vary.mm_projector, operator)
    vary.language_model.norm = Copied(vary.language_model.norm, operator)
    return loaded


@pytest.mark.parametrize("call", [1, 2, 3], ids=["vision", "prefill", "decode"])
def test_after_an_error_the_same_question_has_the_same_answer(model, operator, call):
    def ask() -> str:
        model.encoder.cache.clear()
        return str(model.chat("read", picture(), max_new_tokens=4))

    expected = ask()
    ctypes.CDLL(operator).fail_at_call(call)
    with pytest.raises(RuntimeError, match="bad_alloc"):
        ask()
    assert ask() == expected
