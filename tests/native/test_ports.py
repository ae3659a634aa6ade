"""The kernels on processors that this machine is not, under QEMU's user mode, and from other compilers.

The tests of the arithmetic run on aarch64 in a Python of Debian's packages and PyPI's wheels, which are unpacked into a
temporary folder. Without a compiler, QEMU or these packages, a test is skipped and says why.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindvlm.native.build import INSTRUCTION_SET_OPTIONS, OPTIONS, SOURCES, build
from mindvlm.native.library import INSTRUCTION_SETS, load, open_library
from tests.native.operators import is_here

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path("mindvlm/native/libkernels.so")
# the other tests of this folder need no MindSpore, which starts in no emulator
ARITHMETIC = ("tests/native", *(f"--ignore=tests/native/test_{name}.py" for name in ("amx", "library", "ports")))


def find(program: str) -> str:
    return shutil.which(program) or pytest.skip(f"{program} is not installed")


def run_or_skip(command: list) -> None:
    """Runs a command that needs the network."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the sources and these tests, in which a test puts a library."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("mindvlm", "tests/native"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "tests/__init__.py").touch()
    return tmp_path


def require_arithmetic(project: Path, python: list, expected: list[str], packages: list, **variables: str) -> None:
    """Runs the tests of the arithmetic with a Python; `expected` are the instruction sets that it must find."""
    # a process of its own: no plugins of this one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, packages)), "MINDVLM_CACHE": str(project / "cache")}
    environment |= variables
    command = [*python, "-m", "pytest", "--noconftest", "-q", "-rA", "-p", "no:cacheprovider", *ARITHMETIC]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert [name for name in INSTRUCTION_SETS if any(name in line for line in passed)] == expected
    assert not (project / "cache/native").exists(), "the given library was not used"


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory) -> Path:
    """A folder with the kernels for aarch64, a Python for them in `root` and its packages in `packages`."""
    find("qemu-aarch64"), find("apt-get")
    folder = tmp_path_factory.mktemp("aarch64")
    build(folder / LIBRARY.name, [find("aarch64-linux-gnu-g++")], machine="aarch64")
    for name in ("state", "lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    # folders of its own, so that the system's packages stay as they are
    (folder / "state/status").touch()
    places = {"State": "state", "State::Lists": "lists", "State::Status": "state/status", "Cache": "cache"}
    options = ["APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Sandbox::User=root"]
    options += [f"Dir::{key}={folder / path}" for key, path in places.items()]
    apt = ["apt-get", "-q", "-y", *(word for option in options for word in ("-o", option))]
    run_or_skip([*apt, "update"])
    packages = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
    run_or_skip([*apt, "install", "--download-only", "--no-install-recommends", *packages])
    for package in (folder / "cache/archives").glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    version = (folder / "root/usr/bin/python3").readlink().name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", "--target", folder / "packages"]
    run_or_skip([*pip, "--platform", "manylinux2014_aarch64", "--python-version", version, "numpy<2", "pytest", "tqdm"])
    return folder


@pytest.mark.parametrize(
    ("processor", "expected"),
    [("cortex-a53", ["neon", "portable"]), ("neoverse-n1", ["dotprod", "neon", "portable"])],
)
def test_the_arithmetic_on_aarch64(project, aarch64, processor, expected):
    shutil.copy(aarch64 / LIBRARY.name, project / LIBRARY)
    python = ["qemu-aarch64", "-cpu", processor, "-L", aarch64 / "root", aarch64 / "root/usr/bin/python3"]
    require_arithmetic(project, python, expected, [aarch64 / "packages"])


def test_the_arithmetic_on_a_processor_without_avx2(project):
    python = [find("qemu-x86_64"), "-cpu", "Westmere", sys.executable]
    library = open_library() or pytest.skip("there is no C++ compiler")
    shutil.copy(library.path, project / LIBRARY)
    # NumPy's OpenBLAS takes this processor for a newer one
    require_arithmetic(project, python, ["portable"], sys.path[1:], OPENBLAS_CORETYPE="Nehalem")


# beside Debian's g++, which every other test uses, the compilers that Debian 12 has
@pytest.mark.parametrize("compiler", ["clang++", "g++-11"])
def test_the_arithmetic_of_another_compiler(project, compiler):
    build(project / LIBRARY, [find(compiler)])
    require_arithmetic(project, [sys.executable], sets_of(project / LIBRARY), sys.path[1:])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler is one for x86")
@pytest.mark.parametrize("compiler", ["g++", "clang++", "g++-11"])
def test_a_compiler_writes_the_instructions_of_amx(tmp_path, compiler):
    """Those that test_amx.py emulates."""
    source, options = "kernels_amx.cpp", INSTRUCTION_SET_OPTIONS["x86_64"]["kernels_amx.cpp"]
    command = [find(compiler), *OPTIONS, *options, "-S", SOURCES / source, "-o", tmp_path / "amx.s"]
    subprocess.run(command, check=True)
    words = [line.split(maxsplit=1) for line in (tmp_path / "amx.s").read_text().splitlines()]
    tiles = {word[0] for word in words if word and re.match("tile|ldtile|tdp", word[0])}
    assert tiles == {"ldtilecfg", "tilezero", "tileloadd", "tdpbssd", "tilestored", "tilerelease"}
    # in the reverse order of the manual's: sums += x by weights
    assert ["tdpbssd", "%tmm2, %tmm1, %tmm0"] in words


def sets_of(path: Path) -> list[str]:
    """The instruction sets of a library that this processor has."""
    library = load(path)
    return [name for name in INSTRUCTION_SETS if is_here(library, name)]
