"""Every recorded case of the families that the library has, in both modes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindvlm.families import FAMILIES
from tests.golden_files import GOLDEN_ROOT

RUNNER = Path(__file__).with_name("golden_case.py")
CASES = sorted(path for family in FAMILIES for path in (GOLDEN_ROOT / family).glob("*") if path.is_dir())

if not CASES:
    pytest.skip(f"no recorded cases in {GOLDEN_ROOT} (set MINDVLM_GOLDEN to their folder)", allow_module_level=True)


@pytest.fixture(scope="module", params=["graph", "pynative"])
def reports(request) -> dict[Path, dict | str]:
    """Case -> its report, or why it cannot be run. One process for all: importing MindSpore takes as long as a case."""
    command = [sys.executable, RUNNER, *CASES, "--mode", request.param, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    found: dict[Path, dict | str] = {}
    for report in map(json.loads, done.stdout.splitlines()):
        found[next(case for case in CASES if case.name == report["case"])] = report
    for line in done.stderr.splitlines():
        for case in CASES:
            if line.startswith(f"error: {case}: "):
                found[case] = line.removeprefix(f"error: {case}: ")
    assert found.keys() == set(CASES), done.stderr
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_case(reports, case):
    report = reports[case]
    assert not isinstance(report, str), report
    failed = [f"{item['name']}: {item['result']}" for item in report["items"] if not item["holds"]]
    assert report["holds"], failed or "nothing was compared"
