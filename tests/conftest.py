"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mindspore as ms
import pytest
from hypothesis import settings

from mindvlm.core.progress import progress_to
from mindvlm.core.runtime import set_device
from mindvlm.native.library import Library, open_library
from tests.cores import bind_to_core
from tests.golden_files import golden_path


def pytest_configure() -> None:
    """Removes Hypothesis' time limit, which a busy machine exceeds, and binds each worker of pytest-xdist to a core."""
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        bind_to_core(int(worker.removeprefix("gw")))


def pytest_collection_finish() -> None:
    """Spares the garbage collections that MindSpore starts before each compilation what is imported and collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def weights_cache_of_the_tests(tmp_path_factory) -> Iterator[None]:
    """Redirects the cache of this process and its child processes, so that no test touches the user's cache."""
    folder, run = tmp_path_factory.mktemp("weights_cache"), tmp_path_factory.getbasetemp()
    # the workers of a run share the kernels, which one of them compiles if the installed ones are out of date
    shared = (run.parent if os.environ.get("PYTEST_XDIST_WORKER") else run) / "kernels"
    shared.mkdir(exist_ok=True)
    (folder / "native").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINDVLM_CACHE", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def device_of_the_tests() -> None:
    """Selects the CPU as the library does: tests of Cells do not start a run of their own."""
    set_device("CPU")


@pytest.fixture(scope="session")
def kernels() -> Library:
    """Returns the C++ kernels; skips tests on a machine without a compiler."""
    return open_library() or pytest.skip("there is no C++ compiler")


@pytest.fixture
def pynative() -> Iterator[None]:
    """Sets PyNative mode; restores the mode after the test, which may change it."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Progress lines that the library logs during the test."""
    lines: list[str] = []
    with progress_to(lines.append):
        yield lines


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """Returns `golden_path`, which gives the folder of a recorded case or skips the test."""
    return golden_path
