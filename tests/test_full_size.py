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

RUNTIME_BYTES = 0.5e9
"""MindSpore and the built Cells."""
LOAD = """
import sys
from dataclasses import replace
from mindvlm.core import runtime
from mindvlm.core.host_memory import peak_memory
from mindvlm.models.loading import build_model, open_weights
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
config = read_config("configs/vary/vary_toy.yaml", {"checkpoint": sys.argv[1], "device": "cpu"})
family, context = get_family("vary"), runtime.start(config)
model, _ = build_model(family, config.model, replace(context, linear=native_rules("auto", "CPU")))
with open_weights(config, family, parameter_shapes(model), origin="vary_toy.yaml", cache=False) as weights:
    fill_parameters(model, weights)
    print(peak_memory(), sum(info.num_bytes for info in weights.infos.values()))
"""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "num_parameters"), [("vary_toy", PARAMETERS), ("tinyllava_1_5b", 1_504_353_824)])
def test_generation_stays_within_the_memory_bound(tmp_path, model, num_parameters):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "mindvlm.tools.benchmark", "--model", model]

    settings = ["--only", "mindvlm:float32", "--rounds", "1", "--passes", "1", "--tokens", "4", "--json", str(result)]
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


def test_loading_needs_little_more_memory_than_the_weights_as_stored(tmp_path):
    source, quantized = tmp_path / "model.safetensors", tmp_path / "int4.safetensors"
    write_checkpoint(source, CastSource(RandomSource(toy_shapes(vary_toy_config()), 0), "bfloat16"))
    options = ["--target", str(quantized), "--quant", "int4", "--verify"]
    assert convert_weight.main(["--torch_ckpt_path", str(source), *options]) == 0

    for file in (source, quantized):
        command = [sys.executable, "-c", LOAD, str(file)]
        done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        peak, stored = map(int, done.stdout.split())
        assert peak <= 1.05 * stored + RUNTIME_BYTES
