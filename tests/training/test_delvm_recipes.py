"""The recipes of DeLVM: the original's settings, and jobs that run when their sizes are tiny."""

from pathlib import Path

import pytest

from mindvlm.training.building import read_model
from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.tiny_delvm import TRAINING, training_tensors, write_vqgan
from tests.training.delvm_job import MODEL, write_codes
from tests.training.small_job import losses

CONFIGS = Path(__file__).parents[2] / "configs" / "delvm"
RECIPES = {"train_300m_8_devices": (1024, 8, 2816), "train_1b_8_devices": (2048, 16, 5632)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_settings_of_the_original(name):
    config = read_job(CONFIGS / f"{name}.yaml").config
    decoder, model = read_model(config).model.language_model, read_model(config).model
    assert (decoder.hidden_size, decoder.num_attention_heads, decoder.intermediate_size) == RECIPES[name]
    assert (decoder.num_hidden_layers, decoder.rms_norm_eps, model.input_embedding) == (22, 1e-5, "codebook")
    data, optimizer, scale = config.data, config.optimizer, config.loss_scale
    assert (data.pack_length, data.segment_length, config.num_rows, config.num_passes) == (32768, 2048, 8, 1)
    assert (config.parallel.dp, config.parallel.zero, config.averages_passes, config.dtype) == (8, 1, True, "float16")
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ([0.9, 0.95], 1e-8, 0.1)
    assert (
        optimizer.decays("language_model.norm.weight") and optimizer.decays("x.bias") and optimizer.max_grad_norm == 1
    )
    assert (scale.initial, scale.growth_interval, scale.hysteresis, scale.minimum) == (2**16, 1000, 2, 1)
    rates = [optimizer.learning_rate * config.schedule.factor(step) for step in (0, 223, 224, 40000)]
    assert rates == pytest.approx([1.5e-4 / 224, 1.5e-4, 1.5e-4, 1.5e-5])
    assert (config.schedule.counts, config.seed, data.ignore_code_0) == ("updates", 1024, True)
    single = read_job(CONFIGS / f"{name}.yaml", {"parallel.dp": 1, "parallel.zero": 0}).config
    assert (single.num_rows, single.num_passes) == (8, 8)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_tiny_sizes_runs(name, tmp_path):
    write_vqgan(tmp_path / "vqgan", training_tensors(TRAINING))
    write_codes(tmp_path / "codes", [64, 50] * 20)
    changes = {
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "mode": "pynative",
        "dtype": "float32",
        "data.codes": str(tmp_path / "codes"),
        "data.pack_length": 128,
        "data.segment_length": 64,
        "init.weights": [str(tmp_path / "vqgan")],
        "schedule.total_steps": 2,
        "schedule.warmup_steps": 1,
        "parallel.dp": 1,
        "parallel.zero": 0,
        "log_every": 1,
    }
    changes["model_changes.model.language_model.num_key_value_heads"] = 2
    changes["model_changes.processor.size"] = 8
    for part in ("language_model", "vqgan"):
        changes |= {f"model_changes.model.{part}.{key}": value for key, value in MODEL["model"][part].items()}
    Trainer(read_job(CONFIGS / f"{name}.yaml", changes)).train()
    # 40 codes: the loss of a new decoder is near log 40
    assert [loss for _, loss, _ in losses(tmp_path / "run")] == pytest.approx([3.69, 3.69], abs=0.1)
