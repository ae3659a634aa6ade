"""Blocks that are computed again on the way back: the same gradients, in less memory."""

import json
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.checkpoint import MemorySource
from mindvlm.models.vary.config import parse_config
from mindvlm.models.vary.model import build_model
from mindvlm.nn.lora import LoraConfig
from mindvlm.nn.parameters import fill_parameters
from mindvlm.nn.splice import splice_sources
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.training.lora import add_lora
from mindvlm.training.loss import LossScaleConfig
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.training.trainable import choose_trainable
from tests.tiny_vary import IMAGE_TOKEN_LEN, tiny_config, tiny_opt_config, tiny_weights

NUM_STEPS = 2


@pytest.fixture(autouse=True)
def same_mode():
    mode = ms.get_context("mode")
    yield
    ms.set_context(mode=mode)


def build(config: dict):
    model = build_model(parse_config(config, Path("tiny.yaml")).model)
    fill_parameters(model, MemorySource(tiny_weights(config)))
    return model


def tiny_with_tower():
    """A tower that trains, learned positions, a tied head."""
    return build(tiny_opt_config(model__freeze_vision_tower=False))


def toy():
    """Frozen towers, rotary positions, a head of its own."""
    return build(tiny_config(model__freeze_vision_tower=True))


def toy_with_towers():
    return build(tiny_config(model__freeze_vision_tower=False))


def toy_with_adapters():
    """Adapters with dropout in the decoder, everything else frozen: stages that have nothing to train."""
    model = toy()
    choose_trainable(model, freeze=[], train={}, freezes_all=True)
    config = LoraConfig(rank=2, dropout=0.5, targets=[r"layers\.1\.mlp"])
    add_lora(model, config, seed=3, divided=ParallelModel(), mesh=Mesh())
    for name, parameter in model.parameters_and_names():
        if name.endswith("lora_B"):
            parameter.set_data(Tensor(np.random.default_rng(1).normal(size=parameter.shape).astype(np.float32)))
    return model


def batch(model) -> tuple[Tensor, ...]:
    """Two rows, one with a picture."""
    sizes = model.config
    pad = sizes.language_model.vocab_size - 3
    rng = np.random.default_rng(0)
    ids = rng.integers(4, pad, (2, 20)).astype(np.int32)
    ids[0, 1 : IMAGE_TOKEN_LEN + 3] = [pad + 1, *[pad] * IMAGE_TOKEN_LEN, pad + 2]
    towers = [tower for tower in (sizes.vision_tower, sizes.vision_vocabulary) if tower]
    pixels = [rng.standard_normal((1, 3, *tower.image_size)).astype(np.float32) for tower in towers]
    inv_freq = 1.0 / np.arange(1, sizes.language_model.head_dim // 2 + 1, dtype=np.float32)
    sources = splice_sources(ids, 1, IMAGE_TOKEN_LEN, pad)
    return tuple(Tensor(array) for array in (ids, ids, inv_freq, *pixels, sources))


def trained(make, *, recompute: bool, **settings) -> dict[str, np.ndarray]:
    """Losses, weights and moments after some steps."""
    model = make().set_train()
    step = TrainStep(model, OptimizerConfig(learning_rate=1e-2), recompute=recompute, **settings)
    inputs = batch(model)
    losses = [step(Tensor(1e-2, ms.float32), *inputs).loss.asnumpy() for _ in range(NUM_STEPS)]
    tensors = {name: parameter.asnumpy() for name, parameter in step.state.items()}
    return tensors | {p.name: p.asnumpy() for p in model.get_parameters()} | {"losses": np.stack(losses)}


@pytest.mark.parametrize(
    ("make", "mode", "settings"),
    [
        (tiny_with_tower, ms.PYNATIVE_MODE, {}),
        pytest.param(tiny_with_tower, ms.GRAPH_MODE, {}, marks=pytest.mark.ci),
        (toy_with_adapters, ms.PYNATIVE_MODE, {}),
        pytest.param(toy_with_adapters, ms.GRAPH_MODE, {}, marks=pytest.mark.ci),
        (toy_with_towers, ms.PYNATIVE_MODE, {"loss_scale": LossScaleConfig(initial=8.0)}),
    ],
)
def test_the_steps_are_those_without(make, mode, settings):
    ms.set_context(mode=mode)
    expected, got = (trained(make, recompute=recompute, **settings) for recompute in (False, True))
    assert expected.keys() == got.keys()
    moments = [name for name in got if name.startswith("moment1")]
    assert any(got[name].any() for name in moments) and expected["losses"][0] != expected["losses"][1]
    for name, array in expected.items():
        # compiled, both compute the same to the last bit
        tolerance = 0 if mode == ms.GRAPH_MODE else 1e-6 * np.abs(array).max()
        np.testing.assert_allclose(got[name], array, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_the_depth_of_a_released_model_compiles():
    ms.set_context(mode=ms.GRAPH_MODE)
    model = build(tiny_config(model__freeze_vision_tower=True, model__language_model__num_hidden_layers=24)).set_train()
    step = TrainStep(model, OptimizerConfig(learning_rate=1e-2), recompute=True)
    step.compile(Tensor(1e-2, ms.float32), *batch(model))


def growth(recompute: bool) -> int:
    """Bytes that the peak of a process rises by in a step that is compiled already."""
    script = Path(__file__).with_name("recompute_memory.py")
    command = [sys.executable, str(script), json.dumps(recompute)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.slow
def test_the_activations_of_a_block_are_freed():
    assert growth(True) < 0.75 * growth(False)
