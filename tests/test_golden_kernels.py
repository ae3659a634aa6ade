"""Runs the recorded cases of models on the C++ kernels, with float32 weights and with the cases' own 16-bit ones."""

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.registry import FAMILIES
from mindvlm.native.library import open_library
from tests.native.operators import SETS
from tests.test_golden import CASES, require_holds, run

QUICK = {"clip", "sam_small", "tiny_opt", "llama_clip_hf", "vicuna_small", "lm_hf"}
"""Cases of every kind of layer, which run in `make test`."""
WITHOUT_MODEL = {"prompts", "opt_prompts", "preprocess", "templates", "scorers", "tables", "tiling", "eval", "packing"}
TRAINED = {"train_setup", "train_llama", "train_phi", "kd", "kd_step", "schedule", "train_step", "checkpoint"}
"""Training is computed without the kernels."""
MODELS = [case for case in CASES if case.name not in WITHOUT_MODEL | TRAINED]
RUNS = [("pynative", kernels, name) for name in SETS for kernels in ("float32", "16bit")]
# compiling takes minutes, and the results of a graph do not depend on its own set
RUNS += [("graph", "16bit", SETS[0]), ("graph", "float32", SETS[1])]


def require_set(name: str) -> None:
    """Skips the test if this machine has no compiler or not this instruction set."""
    library = open_library() or pytest.skip("there is no C++ compiler")
    before = library.instruction_set
    try:
        library.choose(name)
    except UserError as error:
        pytest.skip(str(error))
    library.choose(before)


def test_recorded_cases_of_every_kind_of_layer(kernels):
    for report in run([case for case in MODELS if case.name in QUICK], "pynative", "16bit").values():
        require_holds(report)


@pytest.mark.ci
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "kernels", "instructions"), RUNS)
def test_recorded_cases(mode, kernels, instructions, family, monkeypatch):
    require_set(instructions)
    monkeypatch.setenv("MINDVLM_NATIVE", instructions)
    for report in run([case for case in MODELS if case.parent.name == family], mode, kernels).values():
        require_holds(report)
