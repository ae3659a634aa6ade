"""Jobs that train adapters: one model in four forms gives the same logits, runs go on, impossible jobs are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.api import VisionLanguageModel, load, read_config
from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.nn.lora import adapted_linears
from mindvlm.training.trainer import Trainer
from tests.tiny_vary import picture, tiny_config, tiny_weights
from tests.training.small_job import losses, metrics, small_job

ROOT = Path(__file__).parents[2]
EVERY_LINEAR = {"rank": 2, "alpha": 6.0, "targets": ["^language_model", "^mm_projector", "^vision_"]}
DECODER = {
    "rank": 3,
    "targets": [r"model.*[qv]_proj$", r"model.*(down_proj|fc2)"],
    "modules_to_save": ["^mm_projector", r"\.norm\."],
}
RATE = 0.02


def lora_job(folder: Path, *, kind: str = "toy", lora=None, **changes):
    weights = "tiny_opt.safetensors" if kind == "tiny" else "tiny.safetensors"
    defaults = dict(lora=lora or {"rank": 2}, init={"weights": [weights]}, optimizer__learning_rate=RATE)
    return small_job(
        folder, kind=kind, **(defaults | {"schedule__total_steps": 2, "schedule__warmup_steps": 0} | changes)
    )


def train(job) -> Trainer:
    trainer = Trainer(job)
    trainer.train()
    return trainer


def logits(model: VisionLanguageModel) -> np.ndarray:
    return model.logits("<image>\nRead this.", picture(3))


def live_model(folder: Path, trainer: Trainer) -> VisionLanguageModel:
    """The training model itself behind the interface of a loaded one."""
    config = read_config(next(folder.glob("tiny*.yaml")))
    trainer.model.set_train(False)
    return VisionLanguageModel(trainer.model, get_family("vary").processor(config.processor), config)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("toy", EVERY_LINEAR), ("toy", DECODER), ("tiny", {"rank": 1, "targets": ["."]})],
)
def test_trained_saved_and_merged_it_is_one_model(tmp_path, kind, lora):
    trainer = train(lora_job(tmp_path, kind=kind, lora=lora, mode="pynative"))
    step = tmp_path / "run" / "step-2"
    names = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in step.iterdir()) == [*names, "trained.safetensors"]
    config, base = next(tmp_path.glob("tiny*.yaml")), next(tmp_path.glob("tiny*.safetensors"))
    expected = logits(live_model(tmp_path, trainer))
    untrained = logits(load(config))
    assert np.abs(expected - untrained).max() > 1e-2 * np.abs(untrained).max(), "nothing was learned"
    convert(ConversionRequest(sources=(base,), target=tmp_path / "merged.safetensors", merge_lora=step))
    merged = {
        "adapter": load(config, adapter=f"run/{step.name}"),
        "converted": load(config, checkpoint=tmp_path / "merged.safetensors"),
    }
    for how, model in merged.items():
        np.testing.assert_allclose(logits(model), expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max(), err_msg=how)


def test_the_adapter_has_the_names_of_the_published_files(tmp_path):
    train(lora_job(tmp_path, lora=DECODER, schedule__total_steps=1))
    step = tmp_path / "run" / "step-1"
    config = json.loads((step / "adapter_config.json").read_text())
    attention = [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["lora_alpha"] == 16
    assert config["rank_pattern"] == dict.fromkeys(attention, 6)
    assert config["alpha_pattern"] == dict.fromkeys(attention, 32)
    assert set(config["target_modules"]) == {*attention, *(f"transformer.h.{i}.mlp.c_proj" for i in range(2))}
    with (
        open_checkpoint(step / "adapter_model.safetensors") as adapter,
        open_checkpoint(step / "trained.safetensors") as own,
    ):
        prefix = "base_model.model.transformer."
        a, b = (adapter.read(f"{prefix}h.1.attn.c_attn.lora_{x}.weight").data for x in "AB")
        assert a.shape == (6, 32) and b.shape == (96, 6)
        attn = "language_model.layers.1.self_attn"
        for rows, columns, part in ((slice(0, 32), slice(0, 3), "q"), (slice(64, 96), slice(3, 6), "v")):
            np.testing.assert_array_equal(a[columns], own.read(f"{attn}.{part}_proj.lora_A").data)
            np.testing.assert_array_equal(b[rows, columns], own.read(f"{attn}.{part}_proj.lora_B").data)
        assert np.count_nonzero(b) == 2 * 32 * 3
        np.testing.assert_array_equal(
            adapter.read(f"{prefix}mm_projector.bias").data, own.read("mm_projector.bias").data
        )
        assert f"{prefix}ln_f.weight" in adapter.infos and "language_model.embed_tokens.weight" not in own.infos


def test_a_run_goes_on_to_the_last_digit(tmp_path):
    """Dropout and what trains whole included."""
    changes = dict(lora=DECODER | {"dropout": 0.3}, save_every=1)
    whole = train(lora_job(tmp_path, output_dir=str(tmp_path / "whole"), **changes))
    job = lora_job(tmp_path, output_dir=str(tmp_path / "parts"), **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "step-2")
    again = train(job)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 2
    for (name, one), (_, other) in zip(
        whole.model.parameters_and_names(), again.model.parameters_and_names(), strict=True
    ):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy(), err_msg=name)


def test_another_base_is_another_job(tmp_path):
    job = lora_job(tmp_path, schedule__total_steps=1)
    train(job)
    weights = tiny_weights(tiny_config())
    name = "language_model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][0, 0] += 1
    write_checkpoint(tmp_path / "tiny.safetensors", MemorySource(weights))
    with pytest.raises(UserError, match="base weights .was"):
        Trainer(job)


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def test_a_job_learns_the_same_in_both_modes_and_is_evaluated(tmp_path, mode):
    evaluation = {"datasets": "words", "num_samples": 2, "batch_size": 2, "max_new_tokens": 2}
    lora = {"rank": 2, "targets": [r"layers\.\d+\.(self_attn|mlp)", "lm_head"]}
    train(lora_job(tmp_path, mode=mode, lora=lora, output_dir=str(tmp_path / "one"), evaluation=evaluation))
    train(lora_job(tmp_path, mode="pynative", lora=lora, output_dir=str(tmp_path / "other")))
    assert "cer" in metrics(tmp_path / "one")[-1]
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "other"), rtol=1e-4)


def test_only_adapters_and_what_is_named_train(tmp_path):
    trainer = Trainer(lora_job(tmp_path, train=[r"model\.norm\."]))
    names = {name for name, parameter in trainer.model.parameters_and_names() if parameter.requires_grad}
    linears = adapted_linears(trainer.model)
    factors = {f"{name}.lora_{factor}" for name in linears for factor in "AB"}
    assert names == factors | {"language_model.norm.weight"}
    assert len(linears) == 14 and all(name.startswith("language_model.layers.") for name in linears)
    before = {name: p.asnumpy().copy() for name, p in trainer.model.parameters_and_names()}
    trainer.train()
    changed = {n for n, p in trainer.model.parameters_and_names() if not np.array_equal(p.asnumpy(), before[n])}
    assert changed == names
    assert trainer.runner.optimizer_state.keys() == {f"moment{k}.{n}" for n in names for k in (1, 2)} | {"num_updates"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lora={"targets": ["q_porj"]}), r"lora.targets: 'q_porj' matches no name; some names are .*q_proj"),
        (dict(lora={"rank": 0}), "lora.rank is 0"),
        (dict(lora={"targets": ["("]}), "lora.targets: '.' is not a regular expression"),
        (dict(freeze=["mm_"]), "freeze has no effect with lora"),
        (dict(init={"weights": []}), "init.weights is empty"),
        (dict(train=["q_proj"]), "q_proj is among the targets and .*q_proj.weight trains whole"),
        (
            dict(lora={"targets": ["q_proj"]}, train=["k_proj"]),
            "attn.c_attn trains whole and transformer.h.0.attn.c_attn is adapted",
        ),
        (dict(lora={"modules_to_save": ["norm", "nrom"]}), "lora.modules_to_save: 'nrom' matches no name"),
    ],
)
def test_impossible_jobs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        Trainer(lora_job(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_random_weights_under_an_adapter_are_refused(tmp_path):
    weights = {n: v for n, v in tiny_weights(tiny_config()).items() if not n.startswith("mm_projector")}
    changes = dict(init={"weights": ["some.safetensors"], "random": ["mm_projector"]})
    lora_job(tmp_path)
    write_checkpoint(tmp_path / "some.safetensors", MemorySource(weights))
    with pytest.raises(UserError, match=r"do not have mm_projector.weight.*\(4 such tensors\).*modules_to_save"):
        Trainer(lora_job(tmp_path, **changes))
    Trainer(lora_job(tmp_path, lora={"modules_to_save": ["^mm_projector"]}, **changes))


def test_predict_takes_an_adapter(tmp_path):
    train(lora_job(tmp_path, schedule__total_steps=1))
    picture(1).save(tmp_path / "a.png")
    command = [sys.executable, str(ROOT / "tools" / "predict_llm.py"), "--image_dir", str(tmp_path / "a.png")]
    command += ["--config_path", str(tmp_path / "tiny.yaml"), "--max_new_tokens", "2"]
    done = subprocess.run([*command, "--adapter", "run/step-1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"with {tmp_path / 'run' / 'step-1'}" in done.stderr, done.stderr
    done = subprocess.run([*command, "--adapter", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere: no such file or folder" in done.stderr


def test_values_of_a_fresh_adapter_follow_from_the_seed(tmp_path):
    def first_a(**changes) -> Tensor:
        model = Trainer(lora_job(tmp_path, **changes)).model
        return model.language_model.layers[0].mlp.up_proj.lora_A.asnumpy()

    np.testing.assert_array_equal(first_a(), first_a())
    assert not np.array_equal(first_a(), first_a(seed=4))
