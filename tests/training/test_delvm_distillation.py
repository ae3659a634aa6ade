"""Jobs that distil a decoder: the forms of a teacher, what is saved and logged, resume, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.core.errors import UserError
from mindvlm.models.delvm import teacher
from mindvlm.training import building
from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from tests.parallel.launch import start
from tests.tiny_delvm import TRAINING, VQGAN, write_hf, write_training
from tests.training.delvm_job import MODEL, write_job
from tests.training.small_job import losses, metrics, read_tensors

ROOT = Path(__file__).parents[2]
TEACHER = {**TRAINING, "model": {**TRAINING["model"], "hidden_size": 48, "num_layers": 3, "num_attention_heads": 4}}
OPTIONS = {"gt_weight": 0.8, "kd_weight": 0.5, "temperature": 2.0}


def teacher_folder(folder: Path) -> Path:
    """Writes a teacher that is wider and deeper than the student and has another VQGAN; returns its folder."""
    place = folder / "teacher"
    return place if place.exists() else write_training(place, TEACHER, seed=5)


def distil(folder: Path, *, teacher: str = "teacher", output: str = "run", options=OPTIONS, **changes) -> Trainer:
    """Returns the trainer of a job with a teacher."""
    teacher_folder(folder)
    path = write_job(folder, distillation={"teacher": teacher, **options}, **changes)
    return Trainer(read_job(path, {"output_dir": str(folder / output)}))


def terms(folder: Path) -> list[tuple[float, float, float]]:
    return [(one["loss"], one["loss_gt"], one["loss_kd"]) for one in metrics(folder) if "loss" in one]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished job, with its run in "run"."""
    folder = tmp_path_factory.mktemp("distilled")
    distil(folder).train()
    return folder


def test_both_terms_are_logged_and_the_teacher_is_not_saved(run):
    found = np.array(terms(run / "run"))
    assert len(found) == 6 and (found > 0).all()
    np.testing.assert_allclose(found[:, 0], found[:, 1:].sum(1), rtol=1e-6)
    # random codes have no structure, but the teacher's distribution can be learned
    assert found[-1, 2] < 0.95 * found[0, 2]
    names = set(read_tensors(run / "run/step-6"))
    assert not any("teacher" in name for name in names)
    distil(run, output="alone", options={"gt_weight": 0.8, "kd_weight": 0.0}, schedule__total_steps=2).train()
    assert terms(run / "alone")[0][1:] == (found[0, 1], 0.0)


@pytest.fixture
def teachers(monkeypatch) -> list:
    """The teachers that are built during a test."""
    built, build = [], teacher.build_teacher
    monkeypatch.setattr(
        teacher, "build_teacher", lambda *args, **options: built.append(build(*args, **options)) or built[-1]
    )
    return built


def test_the_teacher_does_not_change_and_no_gradient_reaches_it(run, tmp_path, teachers):
    trainer = distil(run, output=str(tmp_path / "again"), schedule__total_steps=2)
    trained = trainer.runner.step.optimizer.parameters
    assert all(one.name.startswith("language_model.") for one in trained)
    assert {one.name for one in trained} == {one.name for one in trainer.model.trainable_params()}
    parameters = list(teachers[0].get_parameters())
    assert all(one.name.startswith("teacher.") and not one.requires_grad for one in parameters)
    before = [one.asnumpy().copy() for one in parameters]
    trainer.train()
    for one, values in zip(parameters, before, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), values, err_msg=one.name)


def test_all_forms_of_a_teacher_give_the_same_losses(run, tmp_path):
    """Shards of a training, the Hugging Face form without a VQGAN, and converted tensors with their YAML."""
    found = {"training": terms(run / "run")}
    write_hf(tmp_path / "hf", run / "teacher")
    convert(ConversionRequest(sources=(run / "teacher",), target=tmp_path / "converted.safetensors"))
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 12}
    model = {**MODEL["model"], "language_model": {**MODEL["model"]["language_model"], **sizes}}
    model["language_model"]["intermediate_size"] = 256
    document = {**MODEL, "checkpoint": "converted.safetensors", "model": model}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(document))
    for name in ("hf", "teacher.yaml"):
        output = str(tmp_path / f"run-{name}")
        distil(run, teacher=str(tmp_path / name), output=output, schedule__total_steps=3).train()
        found[name] = terms(Path(output))
    for name in ("hf", "teacher.yaml"):
        np.testing.assert_allclose(found[name][0], found["training"][0], rtol=1e-5, err_msg=name)


def test_a_checkpoint_of_a_run_is_a_teacher(run, tmp_path, teachers):
    distil(run, teacher=str(run / "run/step-6"), output=str(tmp_path / "student"), schedule__total_steps=2).train()
    saved = read_tensors(run / "run/step-6")
    own = {one.name.removeprefix("teacher."): one.asnumpy() for one in teachers[0].get_parameters()}
    np.testing.assert_array_equal(own["lm_head.weight"], saved["language_model.lm_head.weight"])
    table = saved["vqgan.quantize.embedding.weight"] @ saved["language_model.embed_tokens.projection.weight"].T
    np.testing.assert_allclose(own["embed_tokens.weight"], table, rtol=1e-6)


def test_a_student_with_its_own_table_learns_too(tmp_path):
    trainer = distil(tmp_path, model_changes={"model": {"input_embedding": "table"}}, schedule__total_steps=4)
    trainer.train()
    found = np.array(terms(tmp_path / "run"))
    assert found[-1, 2] < found[0, 2]


def test_matrices_of_16_bits_stay_small(tmp_path, teachers):
    source = teacher_folder(tmp_path)
    with open_checkpoint(source) as checkpoint:
        half = {name: checkpoint.read(name).data.astype(np.float16) for name in checkpoint.infos}
    (source / "model_tp0_pp0.pt").unlink()
    write_checkpoint(source / "model_tp0_pp0.pt", MemorySource(half))
    trainer = distil(tmp_path, schedule__total_steps=2)
    assert {str(one.dtype) for one in teachers[0].get_parameters() if one.ndim == 2} == {"Float16"}
    trainer.train()
    assert np.isfinite(terms(tmp_path / "run")).all()


def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path):
    output = str(tmp_path / "other")
    trainer = distil(run, output=output)
    while trainer.step < 4:
        if trainer.step == 0:
            trainer.metrics = None
            trainer.data.start(0, None)
        trainer.train_step()
    resumed = distil(run, output=output)
    assert resumed.step == 3
    resumed.train()
    assert losses(Path(output)) == losses(run / "run")[3:]
    first, second = (read_tensors(place / "step-6") for place in (run / "run", Path(output)))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_resuming_with_another_teacher_or_weight_is_refused(run, tmp_path):
    write_training(tmp_path / "teacher", TEACHER, seed=6)
    with pytest.raises(UserError, match="distillation.teacher"):
        distil(run, teacher=str(tmp_path / "teacher"))
    with pytest.raises(UserError, match="distillation.kd_weight"):
        distil(run, options={**OPTIONS, "kd_weight": 0.25})
    # the same weights at another place
    (tmp_path / "moved").symlink_to(run / "teacher")
    assert distil(run, teacher=str(tmp_path / "moved")).step == 6


def test_the_recipe_has_the_settings_of_the_original():
    one, eight = (read_job(ROOT / f"configs/delvm/distil_1b_to_300m{end}.yaml").config for end in ("", "_8_devices"))
    model = building.read_model(one).model
    assert (model.input_embedding, model.language_model.rms_norm_eps) == ("codebook", 1e-5)
    section = one.own_sections["distillation"]
    assert (section.gt_weight, section.kd_weight, section.temperature) == (1.0, 1.0, 1.0)
    assert not section.inverse and not section.masked and Path(section.teacher).name == "LLaMA-1b-hf"
    assert one.num_rows * one.data.pack_length == eight.num_rows * eight.data.pack_length == 262_144
    assert (one.num_passes, eight.num_passes, eight.parallel.zero, one.averages_passes) == (8, 1, 1, True)
    rates = [one.optimizer.learning_rate * one.schedule.factor(step) for step in (0, 223, 224, 39_999)]
    np.testing.assert_allclose(rates, [6.696e-7, 1.5e-4, 1.5e-4, 1.5e-5], rtol=1e-3)
    assert (one.optimizer.betas, one.optimizer.eps, one.optimizer.weight_decay) == ([0.9, 0.95], 1e-8, 0.1)
    assert one.optimizer.decays("language_model.norm.weight") and one.optimizer.max_grad_norm == 1.0


def write_vocabulary(folder: Path) -> str:
    config = {**TEACHER, "vq_config": {**VQGAN, "num_embeddings": 41}}
    config["model"] = {**TEACHER["model"], "vocab_size": 41}
    return write_training(folder / "other", config).name


def write_text_model(folder: Path) -> str:
    (folder / "text").mkdir()
    (folder / "text/config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    return "text"


def write_one_shard(folder: Path) -> str:
    shutil.copytree(folder / "run/teacher", folder / "shard")
    (folder / "shard/model_tp0_pp0.pt").rename(folder / "shard/model_tp1_pp0.pt")
    return "shard"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: "nowhere", "distillation.teacher .*nowhere: no such file or folder; give the folder of a dec"),
        (write_text_model, "distillation.teacher .*text: describes no decoder of DeLVM"),
        (lambda folder: "vqgan", "distillation.teacher .*vqgan: describes no decoder of DeLVM"),
        (write_vocabulary, "distillation.teacher .*other: has 41 codes but the student 40"),
        (write_one_shard, "distillation.teacher: .*shard: holds 1 shards of a training but not model_tp0_pp0.pt"),
        (lambda folder: "model.yaml", "distillation.teacher .*model.yaml: names no weights"),
        (lambda folder: "job.yaml", "distillation.teacher: .*job.yaml is a training job; give the YAML of a model"),
        (lambda folder: "run/teacher", "distillation.teacher .*lies in output_dir .*run, to which this job writes"),
    ],
)
def test_bad_teachers_are_refused_in_one_line(tmp_path, prepare, message):
    write_job(tmp_path)
    (tmp_path / "run").mkdir()
    write_training(tmp_path / "run/teacher", TEACHER)
    with pytest.raises(UserError, match=message) as error:
        distil(tmp_path, teacher=prepare(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"teacher": "teacher", "gt_weight": 0, "kd_weight": 0}, "gt_weight is 0.* one of them above 0"),
        ({"teacher": "teacher", "temperature": 0}, "distillation.temperature is 0"),
        ({"teacher": "teacher", "temprature": 2}, "unknown config key 'distillation.temprature'"),
        ({"gt_weight": 1.0}, "distillation.*teacher"),
        ("teacher", "distillation"),
    ],
)
def test_bad_sections_are_refused_in_one_line(tmp_path, section, message):
    path = write_job(tmp_path, distillation=section)
    with pytest.raises(UserError, match=message) as error:
        read_job(path)
    assert "\n" not in str(error.value)


def test_the_section_can_be_switched_off(tmp_path):
    path = write_job(tmp_path, distillation={"teacher": "teacher"})
    assert not read_job(path, {"distillation": None}).config.own_sections


@pytest.mark.parametrize("layout", [{"dp": 2, "zero": 1}, pytest.param({"tp": 2}, marks=pytest.mark.ci)])
def test_two_processes_give_the_numbers_of_one(tmp_path, layout):
    """Passes that weigh the same are as many in both; the teacher is whole on every process."""
    count = {"accumulation": 2, "averages_passes": True}
    distil(tmp_path, output="one", schedule__total_steps=2, **count).train()
    count["accumulation"] = 2 // layout.get("dp", 1)
    path = write_job(
        tmp_path, distillation={"teacher": "teacher", **OPTIONS}, parallel=layout, schedule__total_steps=2, **count
    )
    arguments = ["--config_path", str(path), "--output_dir", str(tmp_path / "two")]
    job = start(ROOT / "tools" / "train.py", *arguments, num_processes=2, log_dir=tmp_path)
    console, _ = job.communicate(timeout=900)
    assert job.returncode == 0, console
    np.testing.assert_allclose(terms(tmp_path / "two"), terms(tmp_path / "one"), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    alone, shared = (read_tensors(tmp_path / name / "step-2") for name in ("one", "two"))
    for name, array in alone.items():
        np.testing.assert_allclose(shared[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
