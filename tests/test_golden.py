"""Runs every recorded case of the library's families in both modes."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindvlm.models.registry import FAMILIES
from tests.golden_files import GOLDEN_ROOT

RUNNER = Path(__file__).with_name("golden_case.py")
CASES = sorted(path for family in FAMILIES for path in (GOLDEN_ROOT / family).glob("*") if path.is_dir())
MODES = ("graph", "pynative")
# One mode of each case runs in `make test`, the other one in CI. In graph mode: one of each kind of model, if quick.
QUICK_IN_GRAPH = {"clip", "llama_clip_hf", "sam_small", "toy_e2e", "vicuna_336"}
UNREAD = dict.fromkeys(("scorers", "eval"), "scoring answers is not part of the library yet")

if not CASES:
    pytest.skip(f"no recorded cases in {GOLDEN_ROOT} (set MINDVLM_GOLDEN to their folder)", allow_module_level=True)


def is_quick(case: Path, mode: str) -> bool:
    """Returns whether a case runs in this mode in `make test`."""
    return (mode == "graph") == (case.name in QUICK_IN_GRAPH)


def run(cases: list[Path], mode: str) -> dict[Path, dict | str]:
    """Runs the cases in one process, because importing MindSpore takes as long as a case.

    Returns case -> its report, or the error that prevents running it.
    """
    if not cases:
        return {}
    done = subprocess.run(
        [sys.executable, RUNNER, *cases, "--mode", mode, "--json"], capture_output=True, text=True, timeout=1800
    )
    found: dict[Path, dict | str] = {}
    for line in done.stderr.splitlines():
        for case in cases:
            if line.startswith(f"error: {case}: "):
                found[case] = line.removeprefix(f"error: {case}: ")
    for report in map(json.loads, done.stdout.splitlines()):
        # reports come in the order of the cases; two families may have a case of one name
        found[next(case for case in cases if case.name == report["case"] and case not in found)] = report
    assert found.keys() == set(cases), done.stderr
    return found


def run_modes(wanted: Callable[[Path, str], bool]) -> dict[str, dict[Path, dict | str]]:
    """Returns the reports of the wanted cases of both modes. Each family has a process, of which two run at a time."""
    jobs = []
    for mode in MODES:
        for family in FAMILIES:
            cases = [case for case in CASES if case.parent.name == family and case.name not in UNREAD]
            jobs.append((mode, [case for case in cases if wanted(case, mode)]))
    found: dict[str, dict[Path, dict | str]] = {mode: {} for mode in MODES}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (mode, _), reports in zip(jobs, pool.map(lambda job: run(job[1], job[0]), jobs), strict=True):
            found[mode] |= reports
    return found


@pytest.fixture(scope="module")
def quick_reports() -> dict[str, dict[Path, dict | str]]:
    return run_modes(is_quick)


@pytest.fixture(scope="module")
def other_reports() -> dict[str, dict[Path, dict | str]]:
    return run_modes(lambda case, mode: not is_quick(case, mode))


def require_holds(report: dict | str) -> None:
    assert not isinstance(report, str), report
    failed = [f"{item['name']}: {item['result']}" for item in report["items"] if not item["holds"]]
    assert report["holds"], failed or "nothing was compared"


def cases_where(wanted: Callable[[Path, str], bool]) -> list:
    """Returns pytest's parameters of the wanted cases and modes."""
    return [
        pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in MODES if wanted(case, mode)
    ]


@pytest.mark.parametrize(("case", "mode"), cases_where(is_quick))
def test_recorded_case(quick_reports, case, mode):
    if case.name in UNREAD:
        pytest.skip(UNREAD[case.name])
    require_holds(quick_reports[mode][case])


@pytest.mark.ci
@pytest.mark.parametrize(("case", "mode"), cases_where(lambda case, mode: not is_quick(case, mode)))
def test_recorded_case_in_the_other_mode(other_reports, case, mode):
    if case.name in UNREAD:
        pytest.skip(UNREAD[case.name])
    require_holds(other_reports[mode][case])
