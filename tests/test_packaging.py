"""The wheel contains everything that a user without the clone needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory) -> Path:
    """Builds and unpacks the project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # a build leaves files beside the sources
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "rank_*")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


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

    for name in ("predict", "train", "convert", "check", "make-data", "show-views", "benchmark", "evaluate", "cache"):
        assert f"mindvlm-{name} = " in scripts
