"""Environments of evaluation frameworks, made once under build/frameworks with the packages of PyPI."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "frameworks"
NO_NETWORK = re.compile("connection|Temporary failure|Network is unreachable|timed out", re.IGNORECASE)
# torchvision of PyPI declares these in a library that loads only beside a torch for CUDA
DECLARATIONS = """
for _name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# installed without its requirements, one of which is a protobuf older than MindSpore's
NEWER = {"lmms-eval": "lmms-eval==0.7.3"}


def environment(extra: str) -> Path:
    """Returns the folder of commands of the environment of an extra, with mindvlm as it is now.

    Skips the test if there is no network.
    """
    folder = FOLDER / extra
    python, ready = folder / "bin" / "python", folder / "ready"
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    if not ready.exists():
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        # the wheel of torch without CUDA satisfies the pin where there is one; any other torch is gigabytes larger
        (folder / "constraints.txt").write_text(f"{torch}\n")
        constraint = ["-c", str(folder / "constraints.txt")]
        run(str(python), "-m", "pip", "install", "-q", "setuptools>=77", "wheel", *constraint)
        run(str(python), "-m", "pip", "install", "-q", "--no-build-isolation", *constraint, f".[{extra}]")
        if extra in NEWER:
            run(str(python), "-m", "pip", "install", "-q", "--no-deps", NEWER[extra])
        if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
            declare_operators(folder)
        ready.touch()
    run(str(python), "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    return folder / "bin"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"no package registry is reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]


def declare_operators(folder: Path) -> None:
    (file,) = folder.glob("lib/python*/site-packages/torchvision/_meta_registrations.py")
    imported = "import torchvision.extension  # noqa: F401\n"
    assert imported in file.read_text()
    file.write_text(file.read_text().replace(imported, imported + DECLARATIONS))
