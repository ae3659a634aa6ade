"""What a training of SliME starts from and leaves: fresh adapters, config.json, files of single parts, adapters."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mindvlm
from mindvlm.core.config import Scope
from mindvlm.core.errors import UserError
from mindvlm.models.registry import get_family
from mindvlm.models.slime.export import PART_FILES
from mindvlm.models.slime.names import MODELS
from mindvlm.models.slime.positions import sine_table
from mindvlm.training.run_tensors import write_parameters
from tests.tiny_slime import CONFIG, write_tiny_parts, write_tiny_slime
from tests.training.small_job import small_job
from tests.training.test_tinyllava_job import built


def slime_job(folder: Path, **changes):
    defaults = dict(init={"weights": ["model"]}, schedule__total_steps=2, schedule__warmup_steps=0)
    return small_job(folder, kind="slime", **(defaults | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_global_only": True, "mm_learnable_gated": 0, "mm_resampler_topp": 1.0},
        {
            "use_local_only": True,
            "mm_learnable_gated": 1,
            "mm_patch_merge_type": "flat",
            "image_aspect_ratio": "any_res",
        },
        {"conversation_template": "plain", "rope_theta": 5e5, "tokenizer_model_max_length": 128},
    ],
)
def test_config_json_is_written_as_it_was_read(tmp_path, changes):
    config = mindvlm.api.read_config(write_tiny_slime(tmp_path, **changes))
    config.scope = Scope(note="Counts cells.") if changes else None
    files = get_family("slime").companions(config)
    assert {"config.json", "tokenizer.model", "tokenizer_config.json"} <= set(files)
    (tmp_path / "again").mkdir()
    for name, content in files.items():
        (tmp_path / "again" / name).write_bytes(content)
    found = mindvlm.api.read_config(tmp_path / "again")
    assert (found.model, found.scope) == (config.model, config.scope)
    assert {**vars(found.processor), "tokenizer": ""} == {**vars(config.processor), "tokenizer": ""}
    written, expected = json.loads(files["config.json"]), {**CONFIG, **changes, "mm_vision_tower": "clip"}
    assert {key: written[key] for key in expected} == expected


def test_fresh_adapters_start_as_in_the_original(tmp_path):
    """The queries are small, the gate is even, the positions are fixed."""
    job = slime_job(tmp_path, init={"weights": []})
    values = {name: parameter.asnumpy() for name, parameter in built(job)[0].parameters_and_names()}
    for part, grid in (("mm_projector.attn", 4), ("sampler", 2)):
        positions = sine_table(128, grid).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(values[f"{part}.pos_embed"], positions)
        assert 0.018 < values[f"{part}.query"].std() < 0.022
        np.testing.assert_array_equal(values[f"{part}.ln_kv.weight"], 1)
    assert not values["mm_projector.w_gate"].any() and not values["mm_projector.w_noise"].any()


BASE = ["llm", "clip"]
FRESH = [r"^mm_projector\.", r"^sampler\."]
FIRST_RUN = dict(init={"weights": BASE, "random": FRESH}, freeze=["."], train=[r"^mm_projector\.projection\."])
GLOBAL = {"model": {"use": "global"}, "processor": {"views": {"use": "global"}}}


def leave_parts(folder: Path, job) -> tuple[Path, dict[str, np.ndarray]]:
    """Writes what a run of the job leaves, without training; returns the folder and the weights."""
    model, config = built(job)
    parameters, step = dict(model.parameters_and_names()), folder / "step-1"
    step.mkdir()
    write_parameters(step / "weights.safetensors", parameters)
    PART_FILES.write(step, [parameter.name for parameter in model.trainable_params()], MODELS)
    for name, content in get_family("slime").companions(config).items():
        (step / name).write_bytes(content)
    return step, {name: parameter.asnumpy() for name, parameter in parameters.items()}


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_parts(folder)
    step, values = leave_parts(folder, slime_job(folder, **FIRST_RUN))
    return folder, step, values


def test_a_later_run_starts_from_both_files(handed_over):
    folder, step, values = handed_over
    files = [str(step / "mm_projector.bin"), str(step / "sampler.bin")]
    # the files of the decoder and of the tower may come later
    for weights in ([*BASE, *files], [*files, *BASE], [str(step)]):
        for name, parameter in built(slime_job(folder, init={"weights": weights}))[0].parameters_and_names():
            np.testing.assert_array_equal(parameter.asnumpy(), values[name], err_msg=name)
    # it does not stand in the way of the weights
    assert mindvlm.load(step, device="cpu", mode="pynative", cache=False).chat("What?", max_new_tokens=1).ids


def test_files_of_trained_tensors_lack_the_positions(handed_over):
    folder, step, values = handed_over
    kept = {}
    for name in ("mm_projector.bin", "sampler.bin"):
        kept |= torch.load(step / name, weights_only=True)
    torch.save({name: one for name, one in kept.items() if "pos_embed" not in name}, folder / "trained.bin")
    model, _ = built(slime_job(folder, init={"weights": [*BASE, "trained.bin"]}))
    for name in ("mm_projector.attn.pos_embed", "sampler.pos_embed", "sampler.query"):
        np.testing.assert_array_equal(dict(model.parameters_and_names())[name].asnumpy(), values[name])


def test_values_that_a_short_dtype_cannot_hold_keep_theirs(tmp_path):
    """The gate and the positions are stored as in the original, unless that rounds a trained value."""
    write_tiny_parts(tmp_path)
    job = slime_job(tmp_path, **(FIRST_RUN | {"train": ["w_gate"]}))
    model, _ = built(job)
    for value, dtype in ((0.5, torch.bfloat16), (0.1, torch.float32)):
        model.mm_projector.w_gate.set_data(model.mm_projector.w_gate * 0 + value)
        write_parameters(tmp_path / "weights.safetensors", dict(model.parameters_and_names()))
        PART_FILES.write(tmp_path, ["mm_projector.w_gate"], MODELS)
        saved = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
        gate = saved["model.mm_projector.w_gate"]
        assert gate.dtype == dtype and (gate.float() == torch.tensor(value)).all()
        assert saved["model.mm_projector.attn.pos_embed"].dtype == torch.float16
        assert saved["model.mm_projector.attn.query"].dtype == torch.float32


def changed(step: Path, name: str, change) -> Path:
    """Writes a file of a run with changed tensors beside the run."""
    path = step.with_name(f"changed-{name}")
    torch.save(change(torch.load(step / name, weights_only=True)), path)
    return path


def wider(tensors: dict) -> dict:
    sizes = {name: [64 if size == 32 else size for size in one.shape] for name, one in tensors.items()}
    return {name: torch.zeros(size) if "projection" in name else tensors[name] for name, size in sizes.items()}


def without_query_norm(tensors: dict) -> dict:
    return {name: one for name, one in tensors.items() if not name.endswith("ln_q.bias")}


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        (
            None,
            r"no values for 15 tensors \(sampler.query, .*that has them, such as the sampler.bin of an earlier run",
        ),
        (wider, r"changed-mm_projector.bin: tensor mm_projector.projection.0.weight has shape \[64, 128\]; .* \[32"),
        (without_query_norm, "changed-mm_projector.bin .*missing model.mm_projector.attn.ln_q.bias"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit_are_one_line(handed_over, projector, message):
    folder, step, _ = handed_over
    files = [step / "mm_projector.bin"] if projector is None else [step / "sampler.bin"]
    files += [changed(step, "mm_projector.bin", projector)] if projector else []
    with pytest.raises(UserError, match=message) as error:
        built(slime_job(folder, init={"weights": [*BASE, *map(str, files)]}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_changes=GLOBAL, freeze=["."], train=[r"^sampler\."]), r"train: .* sampler.query \(no output"),
        (
            dict(freeze=["."], train=["pos_embed"]),
            r"train: .* cannot train, .*pos_embed \(the model keeps it constant\)",
        ),
        (dict(freeze=["."], train=["w_noise"]), r"train: .* cannot train, .*w_noise \(no output"),
        (dict(model_changes=GLOBAL, optimizer__learning_rate_factors={r"^sampler\.": 0.1}), "no parameter that trains"),
        (dict(freeze=[r"^mm_"], optimizer__learning_rate_factors={r"^mm_": 0.1}), "matches no parameter that trains"),
        (dict(model_changes={"model": {"use": "global"}}), "processor.views.use is both but model.use is global"),
        (dict(lora={"targets": [r"^vision_tower\."]}), r"lora.targets: .* cannot train, .*vision_tower.* constant\)"),
        (dict(init={"weights": BASE, "random": FRESH}, lora={}), r"w_gate .*\(36 such tensors\); add it to lora.mod"),
    ],
)
def test_settings_without_effect_are_refused(handed_over, changes, message):
    folder, step, _ = handed_over
    with pytest.raises(UserError, match=message):
        built(slime_job(folder, **({"init": {"weights": [str(step)]}} | changes)))


@pytest.mark.parametrize(
    ("use", "gate", "expected"),
    [
        ("both", "learned", {"projection", "w_gate", "attn", "sampler"}),
        ("global", "mlp", {"projection"}),
        ("global", "resampler", {"projection", "attn"}),
        ("local", "learned", {"projection", "sampler"}),
        ("both", "mlp", {"projection", "sampler"}),
    ],
)
def test_only_what_an_output_depends_on_trains(handed_over, use, gate, expected):
    folder, step, _ = handed_over
    changes = {"model": {"use": use, "gate": gate}, "processor": {"views": {"use": use}}}
    job = slime_job(folder, init={"weights": [str(step)]}, model_changes=changes, freeze=[r"^language_model\."])
    names = [parameter.name for parameter in built(job)[0].trainable_params()]
    assert {name.removeprefix("mm_projector.").split(".")[0] for name in names} == expected
    assert not any(name.endswith(("pos_embed", "w_noise")) for name in names)


def test_adapters_leave_out_the_tower_which_passes_no_gradient(handed_over):
    folder, _, _ = handed_over
    job = slime_job(folder, init={"weights": ["model"]}, recompute=True, lora={"targets": ["q_proj"]})
    model = built(job)[0]
    names = {parameter.name.split(".")[0] for parameter in model.trainable_params()}
    assert names == {"language_model", "mm_projector", "sampler"} and model.freeze_vision_tower
