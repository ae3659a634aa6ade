"""The recipes of SliME: rows, rates and what trains, on models of published widths and few layers."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from mindvlm.models.registry import get_family
from mindvlm.nn.lora import adapted_linears
from mindvlm.nn.shapes import decoder_shapes
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.training import building
from mindvlm.training.job_file import read_job
from mindvlm.training.lora import add_lora
from mindvlm.training.memory import estimate_training
from mindvlm.training.resume import fingerprint, require_same_job
from mindvlm.training.trainable import check_optimizer_patterns, choose_trainable

CONFIGS = Path(__file__).parents[2] / "configs" / "slime"
MLP = {4096: 20_979_712, 5120: 31_467_520, 8192: 75_513_856}
# without the fixed positions
RESAMPLER, COMPRESSION = 5_384_192 - 576 * 1024, 4_499_456 - 144 * 1024
GATE = 1024 * 2
FEW_LAYERS = {f"model_changes.model.{part}.num_hidden_layers": 2 for part in ("language_model", "vision_tower")}


def everything_but_decoder(width: int) -> int:
    return MLP[width] + GATE + RESAMPLER + COMPRESSION


# numbers that train (without the decoder), rows of a step and of a pass, learning rate, template, gate and use
RECIPES = {
    "7b_1a": (MLP[4096], 256, 32, 1e-3, "plain", "mlp", "global"),
    "7b_1b": (RESAMPLER, 256, 32, 1e-3, "plain", "resampler", "global"),
    "7b_2": (COMPRESSION, 256, 32, 1e-3, "plain", "learned", "local"),
    "7b_3": (everything_but_decoder(4096), 128, 16, 2e-5, "v1", "learned", "both"),
    "8b_1a": (MLP[4096], 256, 32, 5e-4, "plain", "mlp", "global"),
    "8b_1b": (RESAMPLER, 256, 32, 5e-4, "plain", "resampler", "global"),
    "8b_2": (COMPRESSION, 256, 8, 5e-4, "plain", "learned", "local"),
    "8b_3": (everything_but_decoder(4096), 128, 8, 1e-5, "llama3", "learned", "both"),
    "13b_1a": (MLP[5120], 256, 16, 1e-3, "plain", "mlp", "global"),
    "13b_1b": (RESAMPLER, 256, 16, 1e-3, "plain", "resampler", "global"),
    "13b_2": (COMPRESSION, 256, 16, 1e-3, "plain", "learned", "local"),
    "13b_3": (everything_but_decoder(5120), 128, 8, 2e-5, "v1", "learned", "both"),
    "70b_1a": (MLP[8192], 256, 8, 1e-3, "plain", "mlp", "global"),
    "70b_1b": (RESAMPLER, 256, 8, 1e-3, "plain", "resampler", "global"),
    "70b_2": (COMPRESSION, 256, 8, 1e-3, "plain", "learned", "local"),
}
LORA = ("8b_lora", "70b_lora")


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_trains(name, said):
    config = read_job(CONFIGS / f"train_{name}.yaml", FEW_LAYERS).config
    model_config = building.read_model(config)
    model = get_family(config.family).build(model_config.model)
    choose_trainable(model, freeze=config.freeze, train={"train": config.train})
    found = sum(parameter.size for parameter in model.trainable_params())
    numbers, rows, batch_size, rate, template, gate, use = RECIPES[name]
    if name.endswith("3"):
        numbers += sum(map(math.prod, decoder_shapes(model_config.model.language_model, "").values()))
    assert found == numbers
    assert (config.num_rows, config.batch_size, config.optimizer.learning_rate) == (rows, batch_size, rate)
    assert (model_config.processor.template, model_config.model.gate, model_config.model.use) == (template, gate, use)
    assert model_config.model.router.top_p == (0.95 if name.endswith("3") else 1.0)
    decays = {parameter.name for parameter in model.trainable_params() if config.optimizer.decays(parameter.name)}
    assert decays and not any("norm" in name or ".ln_" in name or name.endswith("bias") for name in decays)
    check_optimizer_patterns(model, config.optimizer)
    assert said == []


@pytest.mark.parametrize("name", LORA)
def test_the_adapters_of_the_lora_recipes(name, said):
    """The original takes these Linears and no other."""
    config = read_job(CONFIGS / f"train_{name}.yaml", FEW_LAYERS).config
    model = get_family(config.family).build(building.read_model(config).model)
    choose_trainable(model, freeze=[], train={"save": config.lora.modules_to_save}, freezes_all=True)
    add_lora(model, config.lora, seed=0, divided=ParallelModel(), mesh=Mesh())
    check_optimizer_patterns(model, config.optimizer)
    assert said == []
    linears = {f"self_attn.{one}_proj" for one in "qkvo"} | {f"mlp.{one}_proj" for one in ("gate", "up", "down")}
    assert {one.split(".", 3)[3] for one in adapted_linears(model)} == linears and len(adapted_linears(model)) == 14
    whole = {parameter.name for parameter in model.trainable_params() if ".lora_" not in parameter.name}
    assert "mm_projector.w_gate" in whole and "sampler.query" in whole
    assert not any(one.endswith(("pos_embed", "w_noise")) or "language_model" in one for one in whole)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.num_rows) == (128, 256, 0.05, 128)
    rate, factor = config.optimizer.learning_rate, config.optimizer.learning_rate_factor
    assert rate == 1e-4 and rate * factor("sampler.query") == pytest.approx(2e-5) == rate * factor(
        "mm_projector.w_gate"
    )


@pytest.mark.parametrize("name", [*(name for name in RECIPES if name[:2] in ("7b", "8b")), "8b_lora"])
def test_on_8_devices_a_recipe_is_the_same_job(name):
    jobs = [read_job(CONFIGS / f"train_{name}{ending}.yaml") for ending in ("", "_8_devices")]
    model = building.read_model(jobs[0].config)
    require_same_job(*(fingerprint(job, model) for job in jobs), "the checkpoint")
    assert jobs[1].config.parallel.dp == 8 and jobs[0].config.num_rows == jobs[1].config.num_rows


@pytest.mark.ci
@pytest.mark.parametrize("name", ["7b_3_8_devices", "8b_3_8_devices", "13b_1a", "13b_3", "70b_1a"])
def test_a_recipe_of_several_devices_fits_them(name):
    """NPUs of 64 GB by the memory plan, of which a tenth stays free."""
    config = read_job(CONFIGS / f"train_{name}.yaml").config
    model_config = building.read_model(config)
    found = estimate_training(config, model_config, get_family(config.family), dtype=config.dtype)
    assert found.total <= 0.9 * 64 * 2**30


@pytest.mark.ci
def test_the_adapters_of_70b_fit_8_devices():
    """In a process of its own, because unfilled weights take memory that an earlier test has used."""
    command = [sys.executable, "-m", "mindvlm.tools.check_model", "--config_path", CONFIGS / "train_70b_lora.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "(fits 64 GB)" in done.stdout


def test_every_recipe_is_tested():
    names = {path.stem.removeprefix("train_").removesuffix("_8_devices") for path in CONFIGS.glob("train_*.yaml")}
    assert names == {*RECIPES, *LORA}
