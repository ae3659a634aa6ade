"""The recipes of TinyLLaVA: rows, lengths and what trains, on the full-size model without its memory."""

from pathlib import Path

import pytest

from mindvlm.models.registry import get_family
from mindvlm.models.tinyllava.model import build_connector
from mindvlm.models.tinyllava.model_config import ConnectorConfig
from mindvlm.nn.lora import adapted_linears
from mindvlm.nn.norm import norm_weights
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.training import building
from mindvlm.training.job_file import read_job
from mindvlm.training.lora import add_lora
from mindvlm.training.resume import fingerprint, require_same_job
from mindvlm.training.trainable import check_optimizer_patterns, choose_trainable

CONFIGS = Path(__file__).parents[2] / "configs" / "tinyllava"
CONNECTOR = 9_507_840
DECODER = 2_779_632_640
# 14 of the 26 layers of the tower
UPPER_TOWER = 14 * 15_239_504
# rows of a step, learning rate, epochs, numbers that train
RECIPES = {
    "pretrain": (256, 1e-3, 1, CONNECTOR),
    "finetune": (128, 2e-5, 1, CONNECTOR + DECODER),
    "share_pretrain": (256, 2e-5, 1, CONNECTOR + DECODER + UPPER_TOWER),
    "share_finetune": (128, 2e-5, 1, CONNECTOR + DECODER),
    "custom": (128, 2e-5, 1, CONNECTOR + DECODER),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_trains(name, said):
    config = read_job(CONFIGS / f"train_{name}.yaml").config
    model_config = building.read_model(config)
    model = get_family(config.family).build(model_config.model)
    choose_trainable(model, freeze=config.freeze, train={"train": config.train})
    numbers = sum(parameter.size for parameter in model.trainable_params())
    rows, rate, epochs, expected = RECIPES[name]
    assert (config.num_rows, config.optimizer.learning_rate, config.schedule.epochs) == (rows, rate, epochs)
    assert numbers == expected
    assert model_config.processor.template == ("plain" if "pretrain" in name else "phi")
    assert model_config.processor.image.padding == ("none" if "pretrain" in name else "centre")
    assert model_config.model.padding_token_id == (50256 if name == "custom" else None)
    decays = {parameter.name for parameter in model.trainable_params() if config.optimizer.decays(parameter.name)}
    assert decays and not any("norm" in name or name.endswith("bias") for name in decays)
    check_optimizer_patterns(model, config.optimizer)
    assert said == []
    resampler = build_connector(ConnectorConfig(type="resampler"), 1152, 2560)
    resampler.update_parameters_name("mm_projector.")
    assert len(norm_weights(resampler)) == 10
    assert not any(config.optimizer.decays(name) for name in norm_weights(resampler))


def test_the_adapters_of_the_lora_recipe(said):
    """On a model of two layers; the original takes these Linears and no other."""
    config = read_job(CONFIGS / "train_lora.yaml").config
    config.model_changes["model"]["language_model"] |= {"num_hidden_layers": 2, "intermediate_size": 64}
    model_config = building.read_model(config)
    model = get_family(config.family).build(model_config.model)
    choose_trainable(model, freeze=[], train={"save": config.lora.modules_to_save}, freezes_all=True)
    add_lora(model, config.lora, seed=0, divided=ParallelModel(), mesh=Mesh())
    check_optimizer_patterns(model, config.optimizer)
    assert said == []
    adapted = {name.split(".", 3)[3] for name in adapted_linears(model)}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert adapted == attention | {"mlp.fc1", "mlp.fc2"} and len(adapted_linears(model)) == 12
    assert (config.lora.rank, config.lora.alpha, config.schedule.epochs, config.num_rows) == (32, 64, 3, 128)


@pytest.mark.parametrize("name", [*RECIPES, "lora"])
def test_on_8_devices_a_recipe_is_the_same_job(name):
    jobs = [read_job(CONFIGS / f"train_{name}{ending}.yaml") for ending in ("", "_8_devices")]
    model = building.read_model(jobs[0].config)
    require_same_job(*(fingerprint(job, model) for job in jobs), "the checkpoint")
    assert jobs[1].config.parallel.dp == 8 and jobs[0].config.num_passes == 8 * jobs[1].config.num_passes
