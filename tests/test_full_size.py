"""Vary-toy and TinyLLaVA-1.5B at full size: random parameters, converted, loaded and run. Needs 20 GiB of disk, 12 of
memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindvlm.checkpoint import CastSource, open_checkpoint, write_checkpoint
from mindvlm.convert import convert_weight
from mindvlm.convert.reference.random_weights import RandomSource
from mindvlm.convert.reference.vary_layout import parameter_shapes, vary_toy_config

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 2_237_365_504

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "num_parameters"), [("vary_toy", PARAMETERS), ("tinyllava_1_5b", 1_504_353_824)])
def test_generation_stays_within_the_memory_bound(tmp_path, model, num_parameters):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "mindvlm.tools.benchmark", "--model", model, "--only", "mindvlm"]

    subprocess.run([*command, "--rounds", "1", "--tokens", "4", "--json", str(result)], check=True, cwd=ROOT)

    (one,) = json.loads(result.read_text())["rounds"]["mindvlm"]
    assert max(one["peak_bytes"].values()) <= 1.3 * 4 * num_parameters


def test_conversion_accounts_for_every_tensor(tmp_path):
    source = tmp_path / "model.safetensors"
    write_checkpoint(source, CastSource(RandomSource(parameter_shapes(vary_toy_config()), 0), "bfloat16"))
    with open_checkpoint(source) as checkpoint:
        assert len(checkpoint.infos) == 769

    conversion = convert_weight.convert(source, tmp_path / "vary_toy.ckpt", verify=True)

    assert sum(info.num_elements for info in conversion.infos.values()) == PARAMETERS
    assert conversion.num_verified == 769
    assert conversion.sizes == "those of the released vary_toy"
