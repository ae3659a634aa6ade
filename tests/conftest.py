"""Fixtures that all tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.golden_files import golden_path


@pytest.fixture(scope="session", autouse=True)
def weights_cache_of_the_tests(tmp_path_factory) -> Iterator[None]:
    """Nothing that runs here, processes that tests start included, touches the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINDVLM_CACHE", str(tmp_path_factory.mktemp("weights_cache")))
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """Folder of a recorded case by "family/case"; skips the test where it is absent."""
    return golden_path
