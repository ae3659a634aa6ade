"""Every recorded case of the families that the library has, in both modes."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindvlm.families import FAMILIES
from tests.golden_files import GOLDEN_ROOT

RUNNER = Path(__file__).with_name("golden_case.py")
CASES = sorted(path for family in FAMILIES for path in (GOLDEN_ROOT / family).glob("*") if path.is_dir())
MODES = ("graph", "pynative")
# TinyLLaVA's models take up to a minute each, for the many lengths of their scenarios: here each in one mode, the other
# mode is slow.
QUICK_MODELS = {
    *((name, "graph") for name in ("llama", "stablelm", "llama_clip_hf", "e2e_llama", "e2e_phi", "train_llama")),
    *((name, "pynative") for name in ("phi", "llama_clip", "e2e_stablelm", "train_phi")),
}
UNREAD = {"scorers": "scoring answers is not part of the library yet"}

if not CASES:
    pytest.skip(f"no recorded cases in {GOLDEN_ROOT} (set MINDVLM_GOLDEN to their folder)", allow_module_level=True)


def has_model(case: Path) -> bool:
    """Whether a case holds a whole TinyLLaVA."""
    return case.parent.name == "tinyllava" and case.name != "connectors" and any(case.rglob("*.safetensors"))


def is_quick(case: Path, mode: str) -> bool:
    return not has_model(case) or (case.name, mode) in QUICK_MODELS


def run(cases: list[Path], mode: str) -> dict[Path, dict | str]:
    """Case -> its report, or why it cannot be run. One process for all: importing MindSpore takes as long as a case."""
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


@pytest.fixture(scope="module")
def quick_reports() -> dict[str, dict[Path, dict | str]]:
    """Of both modes at once: the other test process is done long before them."""
    read = [case for case in CASES if case.name not in UNREAD]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda mode: run([case for case in read if is_quick(case, mode)], mode), MODES)
        return dict(zip(MODES, found, strict=True))


def require_holds(report: dict | str) -> None:
    assert not isinstance(report, str), report
    failed = [f"{item['name']}: {item['result']}" for item in report["items"] if not item["holds"]]
    assert report["holds"], failed or "nothing was compared"


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in MODES if is_quick(case, mode)],
)
def test_recorded_case(quick_reports, case, mode):
    if case.name in UNREAD:
        pytest.skip(UNREAD[case.name])
    require_holds(quick_reports[mode][case])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in CASES if has_model(case)], ids=lambda case: case.name)
def test_recorded_model(case, mode):
    if case.name in UNREAD:
        pytest.skip(UNREAD[case.name])
    require_holds(run([case], mode)[case])
