"""Where the recorded outputs of the original programs are, if this checkout has them.

The root has one folder per family, and in it one folder per case. It lies beside the clone in ../shared/golden,
or where the environment variable MINDVLM_GOLDEN says.
"""

import json
import os
from pathlib import Path

import pytest

GOLDEN_ROOT = Path(
    os.environ.get("MINDVLM_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden"
).absolute()


def golden_path(name: str) -> Path:
    """A file or folder of the recorded data, as "family/case/file"; skips the test where it is absent."""
    path = GOLDEN_ROOT / name
    if not path.exists():
        pytest.skip(f"recorded reference outputs are not here: {name} (set MINDVLM_GOLDEN to their folder)")
    return path


def golden_json(name: str):
    """The contents of a JSON file of the recorded data; skips like `golden_path`."""
    return json.loads(golden_path(name).read_text(encoding="utf-8"))
