"""Valid and invalid keys and values of a job's YAML."""

from pathlib import Path

import pytest
import yaml

from mindvlm.core.errors import UserError
from mindvlm.models.run_config import read_config
from mindvlm.training.building import read_model
from mindvlm.training.datasets.registry import read_registry
from mindvlm.training.job_file import parse_overrides, read_job
from mindvlm.training.resume import fingerprint, require_same_job
from tests.training.small_job import write_job

CONFIGS = Path(__file__).parents[2] / "configs" / "vary"


@pytest.fixture
def path(tmp_path):
    return write_job(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.learning_rte": 1.0}, "learning_rte.*learning_rate"),
        ({"sede": 1}, "sede.*did you mean 'seed'"),
        ({"rendered_text": {}}, "'data'.*'rendered_text', and only one"),
        ({"data": None}, "'data'.*'rendered_text', and only one"),
        ({"log_every": 0}, "log_every is 0; expected at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"accumulation": 2, "rows_per_step": 4}, "accumulation and rows_per_step"),
        ({"rows_per_step": 3}, r"rows_per_step is 3 but one pass takes 2 rows.*multiple"),
        ({"best": "cer"}, "nothing is evaluated"),
        ({"best": "loss"}, "best"),
        ({"parallel.dp": 0}, "dp is 0"),
        ({"parallel.zero": 1}, "zero is 1 but dp is 1"),
        ({"evaluation": {"datasets": "words", "num_samples": 0}}, "evaluation.num_samples is 0"),
        ({"data.batch_size": "two"}, "data.batch_size.*whole number"),
        ({"mode": "fast"}, "mode"),
        ({"mode.x": 1}, "mode is 'pynative', not a section"),
        ({"weights": "int8"}, "job.yaml: weights is 'int8', but a training job holds all weights in dtype; remove"),
    ],
)
def test_impossible_jobs_are_refused_in_one_line(path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read_job(path, changes)
    assert "\n" not in str(error.value)


def test_a_wrong_key_is_named_with_the_file_in_which_it_stands(path):
    own = path.with_name("own.yaml")
    for text, changes, named, key in (
        ("base: job.yaml\nsede: 1\n", {"seed": 2}, f"{own}: ", "sede"),
        ("base: job.yaml\n", {"sede": 1}, "", "sede"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=f"^{named}unknown config key '{key}'"):
            read_job(own, changes)
    path.write_text(path.read_text() + "sede: 1\n")
    with pytest.raises(UserError, match=f"^{path}: unknown config key 'sede'"):
        read_job(own)


def test_a_job_a_model_and_a_registry_in_the_place_of_another_are_named(path, tmp_path):
    model, registry = tmp_path / "tiny.yaml", tmp_path / "registry.yaml"
    with pytest.raises(UserError, match="tiny.yaml is the config of a model; give a training job that names it as"):
        read_job(model)
    with pytest.raises(UserError, match="registry.yaml is a registry of data sets; .*names it as data.registry"):
        read_job(registry)
    with pytest.raises(UserError, match=r"job.yaml is a training job; give the YAML of a model .*, here tiny.yaml\)"):
        read_config(path)
    with pytest.raises(UserError, match="registry.yaml is a registry of data sets; give the YAML of a model"):
        read_config(registry)
    with pytest.raises(UserError, match="data.registry .*job.yaml is a training job; give a YAML of {NAME"):
        read_registry(path)


def test_values_of_the_command_line_are_yaml():
    texts = ["parallel.dp=8", "best=null", "data.lengths=[64, 128]", "output_dir=runs/a=b", "optimizer.eps=1e-6"]
    assert parse_overrides(texts) == {
        "parallel.dp": 8,
        "best": None,
        "data.lengths": [64, 128],
        "output_dir": "runs/a=b",
        "optimizer.eps": "1e-6",
    }
    for text in ("parallel.dp", "=3", "a=[1"):
        with pytest.raises(UserError, match="--set"):
            parse_overrides([text])


def test_overrides_reach_sections_that_the_file_lacks(path):
    config = read_job(path, {"parallel.dp": 2, "parallel.zero": 2, "optimizer.eps": "1e-6", "rows_per_step": 8}).config
    assert (config.parallel.dp, config.parallel.zero, config.optimizer.eps) == (2, 2, 1e-6)
    assert (config.num_passes, config.num_rows) == (2, 8)


def test_paths_are_relative_to_the_file(path, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    config = read_job(path, {"init.weights": ["tiny.safetensors"], "evaluation": {"datasets": "words"}}).config
    assert config.model_config == str(tmp_path / "tiny.yaml") and config.init.weights == [
        str(tmp_path / "tiny.safetensors")
    ]
    assert config.data.registry == config.evaluation.registry == str(tmp_path / "registry.yaml")


@pytest.mark.parametrize("layout", [{}, {"parallel.dp": 4}, {"parallel.dp": 8, "parallel.zero": 2}, {"parallel.tp": 2}])
@pytest.mark.parametrize("name", ["train_tiny_vocabulary", "train_toy_multitask", "train_toy_sft"])
def test_recipes_differ_in_their_parallel_section_alone(name, layout):
    single = read_job(CONFIGS / f"{name}.yaml")
    other = read_job(CONFIGS / f"{name}.yaml", layout)
    assert single.config.num_rows == other.config.num_rows == 512
    assert other.config.num_passes * other.config.parallel.dp == single.config.num_passes
    model = read_config(single.config.model_config)
    require_same_job(fingerprint(single, model), fingerprint(other, model), "the checkpoint")


def test_every_recipe_can_be_read():
    names = sorted(path.name for path in CONFIGS.glob("train_*.yaml"))
    assert len(names) >= 5
    for name in names:
        read_job(CONFIGS / name)


@pytest.mark.parametrize("name", ["train_tiny_vocabulary", "train_toy_multitask", "train_toy_sft"])
def test_recipes_for_more_devices_differ_in_the_layout_alone(name):
    single = read_job(CONFIGS / f"{name}.yaml")
    for variant, devices in (("8_devices", 8), ("cluster", 64)):
        written = yaml.safe_load((CONFIGS / f"{name}_{variant}.yaml").read_text())
        other = read_job(CONFIGS / f"{name}_{variant}.yaml")
        assert set(written) == {"base", "parallel"} and other.config.parallel.dp == devices
        assert other.config.num_rows == single.config.num_rows == 512
        assert {**other.written, "parallel": None} == {**single.written, "parallel": None}


def test_a_job_is_laid_over_its_base_section_by_section(path):
    variant = path.with_name("variant.yaml")
    variant.write_text(yaml.safe_dump({"base": path.name, "optimizer": {"eps": 1e-6}, "seed": 5}))
    base, job = read_job(path).config, read_job(variant).config
    assert (job.optimizer.eps, job.seed) == (1e-6, 5)
    assert job.optimizer.learning_rate == base.optimizer.learning_rate and job.data == base.data


@pytest.mark.parametrize(
    ("base", "message"),
    [(3, "is 3; expected the name"), ("../job.yaml", "in the same folder"), ("missing.yaml", "does not exist")],
)
def test_a_base_that_cannot_be_used_is_refused(path, base, message):
    variant = path.with_name("variant.yaml")
    variant.write_text(yaml.safe_dump({"base": base}))
    with pytest.raises(UserError, match=message):
        read_job(variant)


def test_a_base_of_a_base_is_refused(path):
    for name, base in (("second.yaml", path.name), ("third.yaml", "second.yaml")):
        path.with_name(name).write_text(yaml.safe_dump({"base": base}))
    with pytest.raises(UserError, match="second.yaml has a base itself; base it on"):
        read_job(path.with_name("third.yaml"))


def job_fingerprint(path, changes=None):
    job = read_job(path, changes)
    return fingerprint(job, read_config(job.config.model_config))


def test_where_a_job_runs_and_what_it_shows_may_change(path):
    then = job_fingerprint(path)
    free = {
        "output_dir": "elsewhere",
        "log_every": 3,
        "save_every": 7,
        "tensorboard": True,
        "data.num_workers": 5,
        "data.batch_size": 1,
        "rows_per_step": 2,
        "evaluation": {"datasets": "words"},
    }
    require_same_job(then, job_fingerprint(path, free), "the checkpoint")


def test_a_run_of_an_earlier_version_resumes(path):
    """Earlier versions wrote `quant`, and the default family of a job that named none."""
    now = job_fingerprint(path)
    require_same_job({**now, "quant": "none", "family": "vary"}, now, "the checkpoint")
    with pytest.raises(UserError, match="quant"):
        require_same_job({**now, "quant": "int8"}, now, "the checkpoint")


def test_a_resume_from_another_config_lists_the_differing_keys(path, tmp_path):
    then = job_fingerprint(path)
    model = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    model["model"]["language_model"]["num_hidden_layers"] = 3
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(model))
    now = job_fingerprint(path, {"optimizer.learning_rate": 0.5, "data.batch_size": 4, "seed": 4})
    with pytest.raises(UserError) as error:
        require_same_job(then, now, "runs/a/step-3")
    for text in (
        "runs/a/step-3 was made by another config",
        "optimizer.learning_rate (was 0.001, is 0.5)",
        "model.language_model.num_hidden_layers (was 2, is 3)",
        "rows of a step (was 2, is 4)",
        "seed (was 3, is 4)",
        "--accept_changes",
    ):
        assert text in str(error.value)
    assert "batch_size" not in str(error.value)


def test_paths_in_the_home_folder(path, tmp_path, monkeypatch):
    """The folder of a run must not become one of the name `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    job = read_job(f"~/{path.relative_to(tmp_path)}", {"output_dir": "~/run", "init.weights": ["~/model"]})
    assert job.config.output_dir == f"{tmp_path}/run" and job.config.init.weights == [f"{tmp_path}/model"]
    assert job.written["output_dir"] == "~/run"


@pytest.mark.parametrize("weights", ["int8", "decoder=int4", "16bit"])
def test_a_model_with_rounded_weights_does_not_train(tmp_path, weights):
    path = write_job(tmp_path, model_changes={"weights": weights})
    with pytest.raises(
        UserError, match=rf"weights is '{weights}', but .*; set model_changes: {{weights: auto}}"
    ) as error:
        read_model(read_job(path).config)
    assert "\n" not in str(error.value)
    assert read_model(read_job(path, {"model_changes": {"weights": "float32"}}).config).weights == "float32"
