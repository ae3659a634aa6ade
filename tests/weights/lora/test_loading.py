"""Loading with an adapter on a CPU: dtypes, formats, answers and peak memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mindvlm
from mindvlm.checkpoint import CastSource, MemorySource, open_checkpoint, write_checkpoint
from mindvlm.nn.parameters import stored_tensors
from mindvlm.nn.products import WeightProduct
from mindvlm.weights.lora.merging import adapted_view
from tests.known_models import VARY
from tests.tiny_vary import tiny_config, tiny_weights, write_tiny_vary
from tests.weights.lora.adapters import PREFIX

ROOT = Path(__file__).resolve().parents[3]
MODULES = [f"language_model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]
CHANGED = {f"{module}.weight" for module in MODULES}
WIDE = {"language_model__hidden_size": 1024, "language_model__head_dim": 512, "language_model__intermediate_size": 4096}


def write_adapter(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    """Writes an adapter of the queries and values, which adds 1/64 to each weight."""
    tensors = {}
    for module in MODULES:
        rows, columns = weights[f"{module}.weight"].shape
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.full((2, columns), 0.25, np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.full((rows, 2), 1 / 64, np.float32)
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_checkpoint(folder / "adapter_model.safetensors", MemorySource(tensors))
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A YAML with 16-bit weights, 68 MB of them, and an adapter."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {f"model__{key}": value for key, value in WIDE.items()}
    weights = tiny_weights(tiny_config(**changes))
    path = write_tiny_vary(folder, weights=weights, **changes)
    write_checkpoint(folder / "tiny.safetensors", CastSource(MemorySource(weights), "bfloat16"))
    return path, write_adapter(folder / "adapter", weights)


def test_unchanged_tensors_stay_as_they_are_stored(wide):
    path, adapter = wide
    with (
        open_checkpoint(path.parent / "tiny.safetensors", mapped=True) as base,
        adapted_view(base, adapter, VARY) as merged,
    ):
        assert list(merged.infos) == list(base.infos)
        for name, info in base.infos.items():
            found, stored = merged.read(name), base.read(name)
            if name in CHANGED:
                assert found.dtype == "float32"
                np.testing.assert_array_equal(found.data, stored.to_float32() + np.float32(1 / 64))
            else:
                assert merged.infos[name] == info
                assert found.data.tobytes() == stored.data.tobytes()
                # read-only arrays are mapped
                assert found.data.flags.writeable == (info.num_bytes < 1 << 20)


@pytest.mark.parametrize(
    ("weights", "stored", "merged"),
    [("auto", 2, 4), ("16bit", 2, 2), ("int8", 34 / 32, 34 / 32), ("int4", 18 / 32, 18 / 32)],
)
def test_matrices_have_the_chosen_format(wide, kernels, weights, stored, merged):
    path, adapter = wide
    model = mindvlm.load(path, adapter=adapter, weights=weights).model
    products = {
        name: product
        for name, product in stored_tensors(model).items()
        if isinstance(product, WeightProduct) and ".layers." in name and name.startswith("language_model.")
    }
    sizes = {name: product.num_bytes / np.prod(product.shape) for name, product in products.items()}
    assert len(sizes) == 2 * 7 and CHANGED < sizes.keys()
    assert sizes == {name: merged if name in CHANGED else stored for name in sizes}


def test_answers_are_those_of_float32_weights(wide, kernels):
    path, adapter = wide
    expected, found, plain = (
        mindvlm.load(path, **options).logits("What is this?")
        for options in ({"adapter": adapter, "weights": "float32"}, {"adapter": adapter}, {})
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(plain - expected).max() > 0.01 * scale


LOAD = """
import sys
import mindvlm, mindvlm.api
from mindvlm.core.host_memory import peak_memory
from mindvlm.native.library import open_library
open_library()
before = peak_memory()
mindvlm.load(sys.argv[1], adapter=sys.argv[2] or None, weights=sys.argv[3])
print(peak_memory() - before)
"""


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_an_adapter_costs_the_memory_of_what_it_changes(wide, kernels, weights):
    path, adapter = wide

    def grown(folder):
        command = [sys.executable, "-c", LOAD, str(path), str(folder), weights]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])

    # 4 merged matrices of 4 MB, one of them being computed
    assert grown(adapter) - grown("") < 4 * 4.2e6 + 12e6
