"""Converts, loads and runs Vary-toy and TinyLLaVA-1.5B at full size with random parameters.

Needs 20 GiB of disk and 12 GiB of memory.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindvlm.checkpoint import CastSource, open_checkpoint, write_checkpoint
from mindvlm.convert import convert_weight
from mindvlm.convert.random_weights import RandomSource
from mindvlm.models.vary.hf_config import vary_toy_config
from tests.hf_shapes import toy_shapes

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 2_237_365_504

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "num_parameters"), [("vary_toy", PARAMETERS), ("tinyllava_1_5b", 1_504_353_824)])
def test_generation_stays_within_the_memory_bound(tmp_path, model, num_parameters):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "mindvlm.tools.benchmark", "--model", model]

    settings = ["--only", "mindvlm:float32", "--rounds", "1", "--tokens", "4", "--json", str(result)]
    subprocess.run([*command, *settings], check=True, cwd=ROOT)

    (one,) = json.loads(result.read_text())["rounds"]["mindvlm:float32"]
    assert max(one["peak_bytes"].values()) <= 1.3 * 4 * num_parameters


def test_conversion_accounts_for_every_tensor(tmp_path):
    source = tmp_path / "model.safetensors"
    write_checkpoint(source, CastSource(RandomSource(toy_shapes(vary_toy_config()), 0), "bfloat16"))
    with open_checkpoint(source) as checkpoint:
        assert len(checkpoint.infos) == 769

    conversion = convert_weight.convert(source, tmp_path / "vary_toy.ckpt", verify=True)

    assert sum(info.num_elements for info in conversion.tensors.infos.values()) == PARAMETERS
    assert conversion.num_verified == 769
    assert conversion.sizes == "those of the released vary_toy"
