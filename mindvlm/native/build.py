"""Compiles the C++ kernels. setup.py imports it too, so it needs the standard library alone."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).with_name("src")
OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-pthread")
WARNINGS = ("-Wall", "-Wextra")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mprefer-vector-width=512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
INSTRUCTION_SET_OPTIONS = {
    "x86_64": {
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_amx.cpp": (*AVX512, "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {"kernels_dotprod.cpp": ("-march=armv8.2-a+dotprod",)},
}
"""Processor -> file -> its further options. The library chooses among these files at run time."""
OPTIONAL = ("kernels_amx.cpp",)
"""Files whose options GCC 10 does not know. Compiled without them, such a file leaves its instruction set out."""


class CompilerError(Exception):
    """The kernels cannot be compiled. Its text is one line; `output` is that of the compiler."""

    def __init__(self, text: str, output: str = ""):
        super().__init__(text)
        self.output = output


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler: `$CXX`, which may have options, or the first of c++, g++ and clang++.

    Raises:
        CompilerError: there is none, or `$CXX` is no command.
    """
    given = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(given)
    except ValueError:
        raise CompilerError(f"CXX is {given!r}, which has a quotation mark without its partner") from None
    if chosen:
        return chosen
    if found := next(filter(shutil.which, ("c++", "g++", "clang++")), None):
        return [found]
    raise CompilerError("there is no C++ compiler; install g++ or clang++, or set CXX")


def source_digest(machine: str | None = None) -> str:
    """Returns a digest of sources, options and machine. A library with another one is out of date."""
    digest = hashlib.sha256(repr((OPTIONS, INSTRUCTION_SET_OPTIONS, machine or platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(target: Path, compiler: Sequence[str] = (), *, machine: str | None = None) -> None:
    """Compiles the kernels to a shared library; the file appears when it is complete.

    Args:
        target: path of the library; its folder exists.
        compiler: command of a C++ compiler, by default `find_compiler()`.
        machine: the processor to compile for, as `platform.machine()` names it; by default this one.

    Raises:
        CompilerError: there is no compiler, or it fails.
        OSError: the library cannot be written.
    """
    compiler, machine = compiler or find_compiler(), machine or platform.machine()
    options = INSTRUCTION_SET_OPTIONS.get(machine, {})
    # the linker keeps the first of equal inline functions: it must be one for any processor, so these files come first
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: (path.name in options, path.name))
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        folder = Path(name)
        objects = [folder / f"{source.stem}.o" for source in sources]
        digest = f'-DMINDVLM_DIGEST="{source_digest(machine)}"'

        def compile_source(source: Path, into: Path) -> None:
            own = options.get(source.name, ())
            if source.name in OPTIONAL and not knows(compiler, own):
                own = ()
            run([*compiler, *OPTIONS, *WARNINGS, *own, digest, "-c", str(source), "-o", str(into)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_source, sources, objects))
        library = folder / target.name
        run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
        library.write_bytes(sealed(library.read_bytes()))
        os.replace(library, target)


def sealed(content: bytes) -> bytes:
    """Returns the content of a library with its digest behind it, which loading ignores."""
    return content + hashlib.sha256(content).digest()


def is_whole(content: bytes) -> bool:
    """Whether the content of a library is as `sealed` returned it."""
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def knows(compiler: Sequence[str], options: tuple[str, ...]) -> bool:
    """Whether a compiler knows options."""
    try:
        run([*compiler, *options, "-fsyntax-only", "-x", "c++", os.devnull])
    except CompilerError:
        return False
    return True


def run(command: list[str]) -> None:
    """Runs the compiler. Raises CompilerError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run ({error.strerror})") from None
    if done.returncode:
        raise CompilerError(
            f"{command[0]} failed with status {done.returncode}", f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        )
