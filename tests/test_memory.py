"""The memory estimate against measured runs, against the engine's own cache, and the readings of what is free."""

import subprocess
import sys
import types
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml

from mindvlm import memory
from mindvlm.api import load
from mindvlm.checkpoint import TensorInfo
from mindvlm.config import build_config
from mindvlm.memory import MIB, estimate_memory
from mindvlm.models.common.weights import parameter_shapes
from mindvlm.models.vary.model import build_model
from mindvlm.models.vary.model_config import VaryModelConfig
from tests.tiny_vary import write_tiny_vary

ROOT = Path(__file__).resolve().parents[1]
LOWEST, HIGHEST = 0.9, 1.2


def decoder(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> dict:
    return {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "head_dim": hidden_size // num_heads, "intermediate_size": intermediate_size,
    }  # fmt: skip


def tower(hidden_size: int, num_layers: int, image_size: int) -> dict:
    return {
        "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64, "image_size": image_size,
    }  # fmt: skip


def shipped(name: str) -> dict:
    return yaml.safe_load((ROOT / f"configs/vary/{name}.yaml").read_text())["model"]


SMALL_VOCABULARY = {
    "embed_dim": 384, "depth": 6, "num_heads": 6, "global_attn_indexes": [2, 5], "image_size": 512,
    "out_chans": 128, "net_2_channels": 256, "net_3_channels": 384,
}  # fmt: skip
SMALL = {
    "language_model": decoder(32000, 512, 8, 8, 1408), "vision_tower": tower(384, 6, 112),
    "vision_vocabulary": SMALL_VOCABULARY, "image_token_len": 64,
}  # fmt: skip
MODELS = {
    "nano": shipped("vary_nano"),
    "small": SMALL | {"max_length": 2048},
    "long": SMALL | {"max_length": 8192},
    "sam_b": {
        "language_model": decoder(8000, 512, 4, 8, 1408), "vision_tower": tower(256, 4, 224), "vision_vocabulary": {},
        "image_token_len": 256, "max_length": 2048,
    },
    "wide": SMALL | {"language_model": decoder(151860, 768, 12, 12, 2048), "max_length": 2048},
    "large_pictures": {
        "language_model": decoder(20000, 1024, 6, 16, 2816), "vision_tower": tower(768, 12, 336),
        "vision_vocabulary": {"embed_dim": 512, "depth": 8, "num_heads": 8, "global_attn_indexes": [3, 7],
                              "image_size": 1536},
        "image_token_len": 576, "max_length": 6000,
    },
    "vary_tiny": shipped("vary_tiny"),
    "vary_toy": shipped("vary_toy"),
}  # fmt: skip

# model, stored dtype, images, prompt length; MiB measured at the end of loading, of a few tokens, of a full context
MEASURED = [
    ("nano", "float32", 1, 60, (414, 702, 702)),
    ("small", "float32", 1, 128, (722, 1228, 1306)),
    ("small", "float32", 0, 128, (722, 962, 1013)),
    ("long", "float32", 4, 1500, (722, 1547, 1807)),
    ("long", "float32", 0, 1500, (722, 1363, 1555)),
    ("sam_b", "float32", 2, 600, (879, 2040, 2071)),
    ("wide", "bfloat16", 1, 300, (1863, 2254, 2422)),
    ("large_pictures", "float16", 2, 2500, (1398, 3581, 3735)),
    ("vary_tiny", "float32", 1, 300, (1277, 2364, 2749)),
    ("vary_toy", "float32", 1, 292, (8958, 10497, 11424)),
]


def estimate(name: str, dtype: str, num_images: int, num_prompt_tokens: int, **options) -> memory.MemoryEstimate:
    config = build_config(VaryModelConfig, MODELS[name])
    weights = [TensorInfo(key, dtype, shape) for key, shape in parameter_shapes(build_model(config)).items()]
    return estimate_memory(
        config, weights, num_images=num_images, num_prompt_tokens=num_prompt_tokens, **options
    )  # fmt: skip


@pytest.mark.parametrize("name, dtype, num_images, num_prompt_tokens, measured", MEASURED)
def test_the_estimate_is_near_what_was_measured(name, dtype, num_images, num_prompt_tokens, measured):
    found = estimate(name, dtype, num_images, num_prompt_tokens)
    for stage, figure in zip(("load", "prefill", "decode"), measured, strict=True):
        assert LOWEST <= getattr(found, stage) / (figure * MIB) <= HIGHEST, stage
    assert found.peak == max(found.load, found.prefill, found.decode)


def test_the_parts_of_vary_toy():
    found = estimate("vary_toy", "bfloat16", 1, 292)
    assert found.parameters == 4 * 2_237_365_504
    assert found.prompt_cache == 2 * 24 * 2048 * 512 * 4
    assert found.full_cache == 2 * 24 * 2048 * (2048 + 1024) * 4
    # on an NPU everything is halved and the runtime is on the host
    halved = estimate("vary_toy", "bfloat16", 1, 292, item_size=2, on_host=False)
    assert (halved.parameters, halved.prompt_cache) == (found.parameters // 2, found.prompt_cache // 2)
    assert (halved.runtime, halved.graphs) == (0, 0)
    assert halved.activations < found.activations


RUN_SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from mindvlm import runtime
from mindvlm.config import build_config
from mindvlm.generation.engine import Engine
from mindvlm.models.common.weights import fill_parameters, parameter_shapes
from mindvlm.models.vary.model import build_model
from mindvlm.models.vary.model_config import VaryModelConfig
from mindvlm.tools.benchmark_stages import peak_resident_bytes
from mindspore import Tensor
from tests.test_memory import MODELS

config = build_config(VaryModelConfig, MODELS["small"])
model = build_model(config, runtime.start(runtime.RuntimeConfig(device="cpu")))
shapes = parameter_shapes(model)
fill_parameters(model, lambda name: np.full(shapes[name], 0.01, np.float32))
engine = Engine(model, placeholder_id=5, max_length=config.max_length)
engine.reset(1)
logits = engine.append([[1] * 1000])
engine.step(Tensor(np.ones(1, np.int32)))
print(peak_resident_bytes())
"""


def test_the_estimate_is_near_a_run_of_this_machine():
    done = subprocess.run(
        [sys.executable, "-c", RUN_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    found = estimate("small", "float32", 0, 1000)
    assert LOWEST <= found.prefill / int(done.stdout.split()[-1]) <= HIGHEST


def test_cache_and_slots_are_those_of_the_engine(tmp_path):
    model = load(write_tiny_vary(tmp_path, model__max_length=1500, model__language_model__training_length=2048))
    config, engine = model.config.model, model.engine
    for length in (1, 129, 1100, 1500):
        engine.reset(1)
        engine.caches, engine.num_slots = None, 0
        engine.append([[1] * length])
        held = sum(parameter.nbytes for parameter in engine.caches.get_parameters())
        found = estimate_memory(config, [], num_images=0, num_prompt_tokens=length)
        assert found.prompt_cache == held, length
        assert found.full_cache >= found.prompt_cache
    assert found.full_cache == held


@pytest.mark.parametrize(
    "stored, item_size, expected",
    [
        (["float32", "float32"], 4, 4 * 110),
        # the second tensor as stored and as float32, beside the first
        (["bfloat16", "bfloat16"], 4, 4 * 10 + (2 + 4) * 100),
        (["float64", "float64"], 4, 4 * 10 + (8 + 4) * 100),
        (["bfloat16", "bfloat16"], 2, 2 * 10 + (2 + 4) * 100),
        (["float32", "float32"], 2, 2 * 10 + (4 + 2) * 100),
    ],
)
def test_loading_holds_one_tensor_twice(stored, item_size, expected):
    infos = [TensorInfo("a", stored[0], (10,)), TensorInfo("b", stored[1], (10, 10))]
    assert memory.loading_bytes(infos, item_size) == expected


def write_counters(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def proc(tmp_path):
    return write_counters(
        tmp_path / "proc",
        meminfo="MemTotal:  9000 kB\nMemAvailable:  5000 kB\nHugePages_Total:  0\n",
        self__status="Name:\tpython\nRssAnon:\t  300 kB\n",
    )


def test_free_memory_without_a_limit(proc, tmp_path):
    # what this process holds will be free when it has ended
    assert memory.free_host_memory(proc, tmp_path / "none") == 5300 * 1024
    unlimited = write_counters(tmp_path / "cgroup", memory_dot_max="max\n", memory_dot_current="1\n")
    assert memory.free_host_memory(proc, unlimited) == 5300 * 1024


@pytest.mark.parametrize("limit, expected", [(2_000_000, 1_500_000), (10**9, 5000 * 1024), (100, 0)])
def test_free_memory_of_a_container(proc, tmp_path, limit, expected):
    cgroup = write_counters(
        tmp_path / "cgroup",
        memory_dot_max=f"{limit}\n",
        memory_dot_current="700000\n",
        memory_dot_stat="anon 1\ninactive_file 200000\n",
    )
    assert memory.free_host_memory(proc, cgroup) == expected + 300 * 1024


def test_free_memory_of_an_old_container(proc, tmp_path):
    cgroup = write_counters(
        tmp_path / "cgroup",
        memory__memory_dot_limit_in_bytes="2000000",
        memory__memory_dot_usage_in_bytes="700000",
        memory__memory_dot_stat="cache 7\ntotal_inactive_file 200000\n",
    )
    assert memory.free_host_memory(proc, cgroup) == 1_500_000 + 300 * 1024


def test_a_system_that_does_not_say(tmp_path):
    assert memory.free_host_memory(tmp_path, tmp_path) is None


def test_free_memory_of_this_machine():
    free = memory.free_host_memory()
    array = np.ones(64 * MIB, np.uint8)
    # a process's own memory counts as free to the next one
    assert abs(memory.free_host_memory() - free) < 1024 * MIB and array[0] and free > 256 * MIB


@pytest.mark.parametrize("free, expected", [(7, 7), (0, None)])
def test_free_memory_of_an_npu(monkeypatch, free, expected):
    monkeypatch.setattr(ms.hal, "get_device_properties", lambda *_: types.SimpleNamespace(free_memory=free))
    assert memory.free_device_memory() == expected


def test_an_npu_that_does_not_say(monkeypatch):
    def unknown(*_):
        raise RuntimeError("no device")

    monkeypatch.setattr(ms.hal, "get_device_properties", unknown)
    assert memory.free_device_memory() is None
