"""The library of kernels: how it is found, compiled and loaded, and how it behaves when a process forks or ends."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.native import library as native
from mindvlm.native.build import CompilerError, find_compiler, sealed, source_digest

OPEN = "from mindvlm.native.library import *; import numpy as np, os; library = open_library()\n"


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library of this session."""
    found = native.open_library()
    return found.path if found else pytest.skip("there is no C++ compiler")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The path of the library in an empty cache."""
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / f"cache/native/kernels-{source_digest()}.so"


@pytest.fixture
def compiler(compiled, tmp_path, monkeypatch) -> Path:
    """A compiler that copies the finished library, and notes every call in `calls`."""
    path = tmp_path / "a compiler"
    path.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$@" >> "{tmp_path}/calls"\ncp "{compiled}" "$last"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{path}' -DANY")
    return path


def num_links(tmp_path: Path) -> int:
    calls = tmp_path / "calls"
    return calls.read_text().count("-shared") if calls.exists() else 0


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def require_fallback(reason: str) -> None:
    with pytest.warns(UserWarning, match="native kernels are not used: ") as found:
        assert native.compile_library() is None
    assert reason in str(found[0].message) and "\n" not in str(found[0].message)


def test_the_environment_chooses_the_instruction_set(compiled):
    printed = OPEN + "print(library and library.instruction_set)"
    assert run(printed, MINDVLM_NATIVE="portable").stdout.strip() == "portable"
    assert run(printed, MINDVLM_NATIVE="off").stdout.strip() == "None"
    assert "MINDVLM_NATIVE is 'sse9'; expected off or one of amx, avx512" in run(printed, MINDVLM_NATIVE="sse9").stderr
    is_x86, has_tiles = "x86" in os.uname().machine, "amx_int8" in Path("/proc/cpuinfo").read_text()
    for missing in ("neon" if is_x86 else "avx2", *(() if has_tiles else ("amx",))):
        assert run(printed, MINDVLM_NATIVE=missing).stderr.endswith(
            f"MINDVLM_NATIVE is '{missing}', which this processor does not have; leave it unset\n"
        )


def test_a_library_is_compiled_once(kept, compiler, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert [native.compile_library().path for _ in range(2)] == [kept, kept]
    assert num_links(tmp_path) == 1 and caplog.text.count("compiling native kernels, once") == 1
    assert "-DANY" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("content", [b"", b"\x7fELF damaged", "other sources", "other machine", "cut", "zeroed"])
def test_a_library_that_does_not_fit_is_replaced(compiled, kept, compiler, tmp_path, content):
    kept.parent.mkdir(parents=True)
    if content == "other sources":
        content = sealed(compiled.read_bytes().replace(source_digest().encode(), b"0" * 16))
    elif content == "other machine":
        # the number of the machine in the header
        content = compiled.read_bytes()[:18] + b"\xf3\x00" + compiled.read_bytes()[20:]
    elif content == "cut":
        content = compiled.read_bytes()[:-4096]
    elif content == "zeroed":
        # in the middle of the code
        content = compiled.read_bytes()[:65536] + bytes(4096) + compiled.read_bytes()[69632:]
    kept.write_bytes(content)
    assert native.load(kept) is None
    assert native.compile_library().path == kept
    assert num_links(tmp_path) == 1


def test_of_two_processes_one_compiles(kept, compiler, tmp_path):
    slow = compiler.read_text().replace("cp ", "sleep 0.2; cp ")
    compiler.write_text(slow)
    code = "from mindvlm.native.library import *; print(compile_library().path)"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == [str(kept)] * 3
    assert num_links(tmp_path) == 1


def test_a_compiler_that_fails_leaves_its_output(kept, compiler):
    compiler.write_text("#!/bin/sh\necho broken; exit 3\n")
    require_fallback(f"failed with status 3, see {kept.with_suffix('.log')}")
    assert "broken" in kept.with_suffix(".log").read_text()
    assert [path.name for path in kept.parent.iterdir() if path.suffix not in (".log", "")] == []


def test_a_compiler_that_does_not_know_an_instruction_set_leaves_it_out(kept, compiler, tmp_path):
    compiler.write_text(compiler.read_text().replace("cp ", 'case "$*" in *-mamx*) exit 1;; esac; cp '))
    assert native.compile_library().path == kept
    compiled = [line for line in (tmp_path / "calls").read_text().splitlines() if " -c " in line]
    assert ["-mavx512f" in line for line in compiled if "kernels_amx.cpp" in line] == [False]
    assert ["-mavx512f" in line for line in compiled if "kernels_avx512.cpp" in line] == ["x86" in os.uname().machine]


def test_no_compiler(kept, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere")
    require_fallback("/nowhere cannot be run (No such file or directory)")
    monkeypatch.setenv("CXX", "g++ '")
    require_fallback('CXX is "g++ \'", which has a quotation mark without its partner')
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    require_fallback("there is no C++ compiler; install g++ or clang++, or set CXX")
    with pytest.raises(CompilerError):
        find_compiler()


def test_a_cache_that_cannot_be_written(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "file/cache"))
    require_fallback(f"{tmp_path}/file/cache/native cannot be written (Not a directory); set MINDVLM_CACHE to another")


def test_no_home_folder(monkeypatch):
    for name in ("MINDVLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    require_fallback("no home folder to keep files in; set MINDVLM_CACHE to a folder")


def test_a_path_that_mindspore_cannot_name(kept, compiled, monkeypatch):
    monkeypatch.setenv("MINDVLM_CACHE", f"{kept.parent}:other")
    require_fallback("MindSpore loads no library from")
    path = kept.parent / "a:b/libkernels.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(compiled.read_bytes())
    assert native.load(path) is None


def test_a_system_without_kernels_says_nothing(monkeypatch, recwarn):
    monkeypatch.setattr(native.platform, "system", lambda: "Darwin")
    assert native.open_library.__wrapped__() is None
    assert not recwarn


MULTIPLY = """
weights = np.ones((4096, 256), np.float32)
matrix = Matrix.of_floats(library, weights, "float32")
def product(): return float(matrix.multiply(np.ones((64, 256), np.float32)).sum())
library.call("mindvlm_set_num_threads", 3)
expected = 4096.0 * 256 * 64
assert product() == expected
"""


def test_a_forked_process_starts_threads_of_its_own(compiled):
    code = OPEN + MULTIPLY + "child = os.fork()\nassert product() == expected\n"
    code += "os._exit(0) if child == 0 else print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    done = run(code)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("end", ["", "os._exit(0)", "import sys; sys.exit(0)", "library = None; matrix.self = matrix"])
def test_a_process_ends_with_live_matrices(compiled, end):
    done = run(OPEN + MULTIPLY + end)
    assert (done.returncode, done.stderr) == (0, "")


def test_fewer_threads_than_wanted_do_the_work(compiled):
    code = OPEN + "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\nos.setuid(65534)\n" + MULTIPLY
    if os.getuid():
        pytest.skip("only root can become a user with few threads")
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lack_of_memory_is_an_error_and_the_next_product_is_right(compiled):
    """Each task needs 256 KiB, which no thread gets."""
    code = (
        OPEN
        + """
import resource
x, y = np.ones((512, 512), np.float32), np.zeros((512, 2048), np.float32)
matrix = Matrix.of_floats(library, np.ones((2048, 512), np.float32), "float32")
library.call("mindvlm_set_num_threads", 3)
matrix.multiply(x[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for limit in (used, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        library.call("mindvlm_multiply", matrix.handle, x.ctypes.data, len(x), y.ctypes.data)
        print((y == 512).all())
    except MemoryError as error:
        print(error)
"""
    )
    # an allocation of that size gets pages of its own, which the limit refuses
    done = run(code, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.stdout.splitlines() == ["no memory for a computation of the native kernels", "True"], done.stderr


def test_freed_matrices_return_their_memory(compiled):
    library, sizes = native.open_library(), []
    for _ in range(6):
        matrix = native.Matrix.of_blocks(library, "q8_0", (4096, 4096))
        matrix.pack(0, np.zeros((4096, 4096 // 32, 34), np.uint8))
        matrix.multiply(np.zeros((64, 4096), np.float32))
        del matrix
        # without pages of files, which the system drops and reads again
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        sizes.append(int(status["RssAnon"].split()[0]))
    assert sizes[-1] - sizes[1] < 16 << 10, sizes


def test_an_instruction_set_that_does_not_exist(compiled):
    with pytest.raises(UserError, match="'mmx', which this processor does not have"):
        native.open_library().choose("mmx")
