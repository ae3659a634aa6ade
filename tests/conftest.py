"""Fixtures that all tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden_files import golden_path


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """Folder of a recorded case by "family/case"; skips the test where it is absent."""
    return golden_path
