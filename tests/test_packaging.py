"""The wheel contains everything that a user without the clone needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "mindvlm/native/libkernels.so"
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")


def copy_sources(folder: Path) -> Path:
    # a build leaves files beside the sources
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "rank_*", "*.so")
    return shutil.copytree(ROOT, folder / "source", ignore=ignored)


def unpacked_wheel(source: Path, folder: Path, **environment: str) -> Path:
    """Builds and unpacks the wheel of a source folder or archive."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, **environment}
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, stdout=subprocess.DEVNULL, env=environment)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory) -> Path:
    """Builds and unpacks the project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    return unpacked_wheel(copy_sources(folder), folder)


def test_the_wheel_reads_a_picture_without_the_clone(wheel_folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder)}
    picture = ROOT / "examples" / "images" / "page.png"

    done = subprocess.run(
        [sys.executable, "-m", "mindvlm.tools.predict_llm", "--image_dir", str(picture), "--max_new_tokens", "8"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert str(wheel_folder) in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "tools.train",
        "convert.convert_weight",
        "tools.check_model",
        "tools.make_data",
        "tools.benchmark",
        "tools.evaluate",
        "tools.serve",
    ],
)
def test_the_other_commands_start_from_the_wheel(wheel_folder, tmp_path, module):
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder)}
    command = [sys.executable, "-m", f"mindvlm.{module}", "--help"]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_wheel_names_the_console_scripts(wheel_folder):
    (entry_points,) = wheel_folder.glob("*.dist-info/entry_points.txt")

    scripts = entry_points.read_text()

    names = (
        "predict",
        "train",
        "convert",
        "check",
        "make-data",
        "show-views",
        "benchmark",
        "evaluate",
        "cache",
        "serve",
    )
    for name in names:
        assert f"mindvlm-{name} = " in scripts


def test_the_wheel_contains_the_web_page(wheel_folder, tmp_path):
    code = "from mindvlm.serving.page import PAGE_FILES; assert all(file.exists() for file, _ in PAGE_FILES.values())"
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def opened_library(folder: Path, cache: Path) -> str:
    """The path of the kernels that an installation without a compiler opens."""
    code = "from mindvlm.native.library import open_library as find; found = find(); print(found and found.path)"
    environment = {**os.environ, "PYTHONPATH": str(folder), "CXX": "/nowhere", "MINDVLM_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cache, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_compiler
def test_the_wheel_contains_the_kernels(wheel_folder, tmp_path):
    assert opened_library(wheel_folder, tmp_path) == str(wheel_folder / LIBRARY)


def test_a_wheel_of_the_source_archive_is_built_without_a_compiler(tmp_path):
    source = copy_sources(tmp_path)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (archive,) = tmp_path.glob("*.tar.gz")

    folder = unpacked_wheel(archive, tmp_path, CXX="/nowhere")

    assert not (folder / LIBRARY).exists()
    names = {path.name for path in (ROOT / "mindvlm/native/src").iterdir()}
    assert {path.name for path in (folder / "mindvlm/native/src").iterdir()} == names
    assert opened_library(folder, tmp_path) == "None"


@needs_compiler
def test_an_editable_installation_puts_the_kernels_beside_their_sources(wheel_folder, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{wheel_folder / LIBRARY}" "$last"\n')
    compiler.chmod(0o755)
    for command, is_compiled in ((compiler, True), ("/nowhere", False)):
        folder = tmp_path / str(is_compiled)
        source = copy_sources(folder)
        # what `pip install -e` calls
        code = f"from setuptools import build_meta; build_meta.build_editable({str(folder)!r})"
        environment = {**os.environ, "CXX": str(command)}
        done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (source / LIBRARY).exists() == is_compiled
        assert ("kernels are not compiled: /nowhere cannot be run" in done.stderr) == (not is_compiled)
