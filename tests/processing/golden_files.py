"""Where the recorded outputs of the original programs are, if this checkout has them beside it."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "vary"


def golden_path(name: str) -> Path:
    """A file or folder of the recorded data; skips the test where it is absent."""
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"recorded reference outputs are not here ({path.name} of golden/vary)")
    return path


def golden_json(name: str):
    return json.loads(golden_path(name).read_text(encoding="utf-8"))
