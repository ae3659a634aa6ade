"""Runs every recorded case of the library's families in both modes."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindvlm.models.registry import FAMILIES
from tests.cores import bind_to_core
from tests.golden_files import GOLDEN_ROOT

RUNNER = Path(__file__).with_name("golden_case.py")
CASES = sorted(path for family in FAMILIES for path in (GOLDEN_ROOT / family).glob("*") if path.is_dir())
MODES = ("graph", "pynative")
# One mode of each case runs in `make test`, the other one in CI. In graph mode: one of each kind of model, if quick.
QUICK_IN_GRAPH = {"clip", "llama_clip_hf", "sam_small", "toy_e2e", "vicuna_336"}

if not CASES:
    pytest.skip(f"no recorded cases in {GOLDEN_ROOT} (set MINDVLM_GOLDEN to their folder)", allow_module_level=True)


def is_quick(case: Path, mode: str) -> bool:
    """Returns whether a case runs in this mode in `make test`."""
    return (mode == "graph") == (case.name in QUICK_IN_GRAPH)


def run(cases: list[Path], mode: str, kernels: Sequence[str] = ("off",)) -> dict[tuple[Path, str], dict | str]:
    """Runs the cases in one process, because importing MindSpore takes as long as a case.

    Args:
        kernels: the values of `--kernels`; each case runs with each of them.

    Returns:
        (case, kernels) -> its report, or the error that prevents running it.
    """
    if not cases:
        return {}
    command = [sys.executable, RUNNER, *cases, "--mode", mode, "--kernels", *kernels, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    found: dict[tuple[Path, str], dict | str] = {}
    for line in done.stderr.splitlines():
        for case, choice in itertools.product(cases, kernels):
            if line.startswith(f"error: {case}: "):
                found[case, choice] = line.removeprefix(f"error: {case}: ")
    for report in map(json.loads, done.stdout.splitlines()):
        # reports come in the order of the cases; two families may have a case of one name
        choice = report["kernels"]
        case = next(case for case in cases if case.name == report["case"] and (case, choice) not in found)
        found[case, choice] = report
    assert found.keys() == set(itertools.product(cases, kernels)), done.stderr
    return found


def run_jobs(jobs: list[tuple[str, list[Path]]]) -> dict[tuple[Path, str], dict | str]:
    """Runs one process per (mode, cases), two at a time. Returns (case, mode) -> what `run` returns."""
    cores = itertools.count()
    found = {}
    with ThreadPoolExecutor(max_workers=2, initializer=lambda: bind_to_core(next(cores))) as pool:
        for (mode, _), reports in zip(jobs, pool.map(lambda job: run(job[1], job[0]), jobs), strict=True):
            found |= {(case, mode): report for (case, _), report in reports.items()}
    return found


@pytest.fixture(scope="module")
def quick_reports() -> dict[tuple[Path, str], dict | str]:
    return run_jobs([(mode, [case for case in CASES if is_quick(case, mode)]) for mode in MODES])


@pytest.fixture(scope="module")
def other_reports() -> dict[tuple[Path, str], dict | str]:
    """One process per family, because one for all comes near its time limit."""
    others = {mode: [case for case in CASES if not is_quick(case, mode)] for mode in MODES}
    return run_jobs(
        [
            (mode, [case for case in cases if case.parent.name == family])
            for mode, cases in others.items()
            for family in FAMILIES
        ]
    )


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
    require_holds(quick_reports[case, mode])


@pytest.mark.ci
@pytest.mark.parametrize(("case", "mode"), cases_where(lambda case, mode: not is_quick(case, mode)))
def test_recorded_case_in_the_other_mode(other_reports, case, mode):
    require_holds(other_reports[case, mode])
