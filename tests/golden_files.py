"""Location of the recorded outputs of the original programs.

The root contains one folder per family, which contains one folder per case. It is `../shared/golden` beside the clone,
or the value of the environment variable MINDVLM_GOLDEN.
"""

import json
import os
from pathlib import Path

import pytest

GOLDEN_ROOT = Path(
    os.environ.get("MINDVLM_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden"
).absolute()


def golden_path(name: str) -> Path:
    """Returns the path of recorded data by "family/case/file"; skips the test if it does not exist."""
    path = GOLDEN_ROOT / name
    if not path.exists():
        pytest.skip(f"recorded reference outputs are not here: {name} (set MINDVLM_GOLDEN to their folder)")
    return path


def golden_json(name: str):
    """Returns the contents of a recorded JSON file; skips the test if it does not exist."""
    return json.loads(golden_path(name).read_text(encoding="utf-8"))
