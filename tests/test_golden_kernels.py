"""Runs the recorded cases of models on the C++ kernels, with float32 weights and with the cases' own 16-bit ones."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from mindvlm.models.registry import FAMILIES
from tests.golden_readers.kernels import FORMATS
from tests.native.operators import SETS, is_here
from tests.test_golden import CASES, require_holds, run

QUICK = {"clip", "sam_small", "tiny_opt", "llama_clip_hf", "vicuna_small", "lm_hf"}
"""Cases of every kind of layer, which run in `make test`."""
WITHOUT_MODEL = {"prompts", "opt_prompts", "preprocess", "templates", "scorers", "tables", "tiling", "eval", "packing"}
TRAINED = {"train_setup", "train_llama", "train_phi", "kd", "kd_step", "schedule", "train_step", "checkpoint"}
"""Training is computed without the kernels."""
MODELS = [case for case in CASES if case.name not in WITHOUT_MODEL | TRAINED]

RUNS = {"pynative": SETS, "graph": [name for name in SETS if name != "portable"]}
"""The instruction sets of a mode."""


def test_recorded_cases_of_every_kind_of_layer(kernels):
    for report in run([case for case in MODELS if case.name in QUICK], "pynative", ["16bit"]).values():
        require_holds(report)


@pytest.fixture(scope="module")
def reports(kernels) -> Callable[[str, str], dict[tuple[Path, str], dict | str]]:
    """Returns a function that runs the cases of a family in one mode with all kernels, in one process."""

    @functools.cache
    def of_family(mode: str, family: str) -> dict[tuple[Path, str], dict | str]:
        choices = [f"{weights}:{name}" for name in RUNS[mode] if is_here(kernels, name) for weights in FORMATS]
        return run([case for case in MODELS if case.parent.name == family], mode, choices)

    return of_family


@pytest.mark.ci
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("mode", "instructions"), [(mode, name) for mode, names in RUNS.items() for name in names])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_cases(family, mode, instructions, weights, kernels, reports):
    if not is_here(kernels, instructions):
        pytest.skip(f"this processor has no {instructions}")
    found = [report for (_, choice), report in reports(mode, family).items() if choice == f"{weights}:{instructions}"]
    assert found
    for report in found:
        require_holds(report)
