"""Environments of evaluation frameworks, made once under build/frameworks with the packages of PyPI."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "frameworks"
NO_NETWORK = re.compile(
    "No matching distribution|connection|Temporary failure|Network is unreachable|timed out", re.IGNORECASE
)
VERSIONS = {"lmms_eval": "lmms-eval==0.7.3", "vlmeval": "ms-vlmeval==0.0.20"}
# what each imports besides the packages of the tests
IMPORTED = {
    "lmms_eval": "datasets evaluate filelock<4 loguru pytablewriter python-dotenv pytz sacrebleu tenacity",
    "vlmeval": "Levenshtein cloudpickle datasets decord json_repair math-verify nest_asyncio num2words "
    "opencv-python-headless portalocker pylatexenc qwen-vl-utils rouge scikit-learn sty tabulate termcolor "
    "timeout-decorator validators",
}
# of VLMEvalKit, installed without the torch that it requires
TORCHVISION = "torchvision==0.28.0"
# torchvision of PyPI declares these in a library that loads only beside a torch for CUDA
DECLARATIONS = """
for _name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def environment(framework: str) -> Path:
    """Returns the folder of commands of an environment with a framework.

    The packages of the running environment are shared, with mindvlm as it is now. The framework is installed without
    its requirements: they ask for gigabytes that it does not import here, and for versions that contradict those of
    mindvlm. Skips the test if there is no network.
    """
    folder = FOLDER / framework
    python, ready = folder / "bin" / "python", folder / f"ready {VERSIONS[framework]}"
    if not ready.exists():
        venv.create(folder, clear=True, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        install(python, "--no-deps", VERSIONS[framework])
        # which also activates packages that are installed in editable mode
        shared = [path for path in sys.path if path.endswith("site-packages")]
        lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in shared)
        (packages / "shared.pth").write_text(lines)
        install(python, "-c", "constraints.txt", *IMPORTED[framework].split())
        if framework == "vlmeval":
            install(python, "--no-deps", TORCHVISION)
            if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
                declare_operators(packages)
        ready.touch()
    return folder / "bin"


def source(framework: str) -> Path:
    """Returns the folder with the modules of a framework. Skips the test if there is no network."""
    folder = FOLDER / "sources" / VERSIONS[framework]
    if not (folder / framework).is_dir():
        install(Path(sys.executable), "--no-deps", "--no-compile", "--target", str(folder), VERSIONS[framework])
    return folder / framework


def install(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"no package registry is reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]


def declare_operators(packages: Path) -> None:
    file = packages / "torchvision" / "_meta_registrations.py"
    imported = "import torchvision.extension  # noqa: F401\n"
    assert imported in file.read_text()
    file.write_text(file.read_text().replace(imported, imported + DECLARATIONS))
