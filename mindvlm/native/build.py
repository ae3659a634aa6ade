"""Compiles the C++ kernels. setup.py imports it too, so it needs the standard library alone."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("src")
OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-pthread")
# GCC's own headers of AVX-512 raise it
WARNINGS = ("-Wall", "-Wextra", "-Wno-maybe-uninitialized")
X86_OPTIONS = {
    "kernels_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512.cpp": (
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
    ),
}
"""Further options of the files whose instruction set is chosen at run time."""


class CompilerError(Exception):
    """The kernels cannot be compiled. Its text is one line; `output` is that of the compiler."""

    def __init__(self, text: str, output: str = ""):
        super().__init__(text)
        self.output = output


def find_compiler() -> str | None:
    """Returns the path of the C++ compiler: `$CXX`, or the first of c++, g++ and clang++; None without one."""
    chosen = os.environ.get("CXX")
    return next(
        (path for name in ([chosen] if chosen else ["c++", "g++", "clang++"]) if (path := shutil.which(name))), None
    )


def source_digest(machine: str | None = None) -> str:
    """Returns a digest of sources, options and machine. A library with another one is out of date."""
    digest = hashlib.sha256(repr((OPTIONS, X86_OPTIONS, machine or platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(target: Path, compiler: str | None = None, *, machine: str | None = None) -> None:
    """Compiles the kernels to a shared library; the file appears when it is complete.

    Args:
        target: path of the library; its folder exists.
        compiler: a C++ compiler, by default `find_compiler()`.
        machine: the processor to compile for, as `platform.machine()` names it; by default this one.

    Raises:
        CompilerError: there is no compiler, or it fails.
        OSError: the library cannot be written.
    """
    compiler, machine = compiler or find_compiler(), machine or platform.machine()
    if compiler is None:
        raise CompilerError("there is no C++ compiler")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        folder, objects = Path(name), []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(folder / f"{source.stem}.o")
            options = X86_OPTIONS.get(source.name, ()) if machine in ("x86_64", "AMD64") else ()
            digest = f'-DMINDVLM_DIGEST="{source_digest(machine)}"'
            run([compiler, *OPTIONS, *WARNINGS, *options, digest, "-c", str(source), "-o", str(objects[-1])])
        library = folder / target.name
        run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
        os.replace(library, target)


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
