"""TinyLLaVA through the production trainer: policies, recompute, what is saved, how it goes on, what is refused."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import save_file

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.registry import get_family
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.parallel.mesh import Mesh
from mindvlm.training import building
from mindvlm.training.job_file import lay_over
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.training.step_runner import model_arguments
from mindvlm.training.trainer import Trainer
from tests.processing.text.small_pieces import write_piece_files
from tests.tiny_tinyllava import hf_config, hf_tensors
from tests.training.small_job import small_job

WEIGHTS = {"weights": ["model"]}
SHARE = {"model": {"tune": {"vision_tower_from_layer": 1}}}
TILES = {
    "model_changes": {
        "model": {"image_newline": True},
        "processor": {
            "tiling": {"resolutions": [[28, 56], [56, 28]], "merge": "spatial_unpad"},
            "image": {"padding": "none"},
        },
    },
    "init": {**WEIGHTS, "random": ["image_newline"]},
}
SHORT = dict(init=WEIGHTS, schedule__total_steps=2, schedule__warmup_steps=0)
SHORT |= dict(data__max_length=192, data__lengths=[192])


def llava_job(folder: Path, **changes):
    return small_job(folder, kind="tinyllava", **(SHORT | changes))


def train(job, **options) -> Trainer:
    trainer = Trainer(job, **options)
    trainer.train()
    return trainer


def built(job):
    """The model of a job, its weights filled."""
    config = job.config
    model_config = building.read_model(config)
    family = get_family(config.family)
    options = {"is_new": True}
    return building.build_model(config, model_config, family, Mesh(), EAGER_FLOAT32, **options)[0], model_config


def trained_parts(job) -> set[str]:
    """Returns the trained parameters, folded: a part, or a part and the number of its layer."""
    names = [parameter.name.split(".") for parameter in built(job)[0].trainable_params()]
    folded = {".".join(name[: 4 if "encoder" in name else 2]) for name in names}
    return {name.replace("vision_tower.encoder.layers", "layer") for name in folded}


DECODER = {f"language_model.{name}" for name in ("embed_tokens", "layers", "norm", "lm_head")}
CONNECTOR = {"mm_projector.0", "mm_projector.2"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, DECODER | CONNECTOR),
        ({"freeze": [r"^language_model\."]}, CONNECTOR),
        ({"model_changes": {"model": {"tune": {"language_model": False}}}}, CONNECTOR),
        (
            {"model_changes": {"model": {"tune": {"language_model": False, "embed_tokens": True}}}},
            CONNECTOR | {"language_model.embed_tokens"},
        ),
        ({"freeze": [r"^language_model\.(embed_tokens|layers|norm)\."]}, CONNECTOR | {"language_model.lm_head"}),
        ({"freeze": [r"^language_model\.lm_head\."]}, DECODER - {"language_model.lm_head"} | CONNECTOR),
        ({"freeze": [r"^mm_projector\."]}, DECODER),
        ({"model_changes": SHARE}, DECODER | CONNECTOR | {"layer.1", "layer.2"}),
        ({"train": [r"^vision_tower\.encoder\.layers\.[12]\."]}, DECODER | CONNECTOR | {"layer.1", "layer.2"}),
        (
            {"model_changes": {"model": {"tune": {"vision_tower_from_layer": -1}}}},
            DECODER | CONNECTOR | {"layer.0", "layer.1", "layer.2", "vision_tower.embeddings"},
        ),
    ],
)
def test_the_policies_of_the_original(tmp_path, changes, expected):
    assert trained_parts(llava_job(tmp_path, **changes)) == expected


def test_evaluation_reads_with_pictures(tmp_path):
    evaluation = {"datasets": "words", "num_samples": 4, "batch_size": 2, "max_new_tokens": 2}
    trainer = train(llava_job(tmp_path, evaluation=evaluation, best="cer", schedule__total_steps=1))
    assert trainer.best and 0 <= trainer.best["cer"]


def test_a_run_without_labels_is_refused_or_stops_and_changes_nothing(tmp_path, said):
    changes = {"model_changes": {"processor": {"template": "phi", "original_parse": True}}}
    with pytest.raises(UserError, match="template 'phi' closes an answer with .* data.inspection: warn"):
        Trainer(llava_job(tmp_path, **changes))
    changes |= dict(data__inspection="warn", max_nan_steps=2, schedule__total_steps=9, optimizer__weight_decay=0.5)
    trainer = Trainer(llava_job(tmp_path, **changes))
    before = {name: parameter.asnumpy().copy() for name, parameter in trainer.model.parameters_and_names()}
    with pytest.raises(UserError, match="no row has a label after 2 such steps, at step 2; .*no checkpoint was"):
        trainer.train()
    for name, parameter in trainer.model.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), before[name], err_msg=name)
    assert any("12 of 12 records have no label" in line for line in said)
    assert not list((tmp_path / "run").glob("step-*"))


def trained(model, inputs, **settings) -> dict[str, np.ndarray]:
    """Losses and weights after two steps."""
    step = TrainStep(model.set_train(), OptimizerConfig(learning_rate=1e-2), **settings)
    found = [step(Tensor(1e-2, ms.float32), *inputs).loss.asnumpy() for _ in range(2)]
    return {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()} | {"losses": np.stack(found)}


@pytest.mark.parametrize(
    ("changes", "averages"),
    [
        ({}, True),
        ({"model_changes": SHARE}, False),
        ({"model_changes": {"model": {"tune": {"vision_tower_from_layer": -1}}}}, False),
        (TILES, False),
        (TILES | {"model_changes": lay_over(TILES["model_changes"], SHARE)}, True),
    ],
)
def test_recompute_gives_the_same_steps(tmp_path, changes, averages):
    job = llava_job(tmp_path, **changes)
    results = []
    for recompute in (False, True):
        model, config = built(job)
        decoder = config.model.language_model
        frequencies = Tensor(inverse_frequencies(decoder.rotary_dim, decoder.rope_theta))
        source = building.open_data(job.config, config, get_family("tinyllava"), Mesh())
        source.start(0, None)
        (one,) = source.take()
        source.close()
        has_tiles = config.processor.tiling is not None
        assert len(one.arrays["pixels.0"]) == (4 if has_tiles else 2), "one picture or its three views, in slots by two"
        inputs = model_arguments(one, frequencies, ms.float32)
        results.append(trained(model, inputs, recompute=recompute, averages_passes=averages))
    plain, recomputed = results
    assert plain["losses"][0] != plain["losses"][1]
    for name, array in plain.items():
        np.testing.assert_allclose(recomputed[name], array, rtol=0, atol=1e-6 * np.abs(array).max(), err_msg=name)


def factors(by_pattern: dict[str, float]) -> dict:
    return {"optimizer__learning_rate_factors": by_pattern}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "vary"}, "family is 'vary' but .*model is of the family 'tinyllava'; set family: tinyllava"),
        ({"model_changes": {"model": {"tune": {"tower": 1}}}}, "unknown config key 'model.tune.tower'"),
        ({"model_changes": {"processor": {"template": "ph"}}}, "template 'ph'"),
        ({"data__max_length": 300, "data__lengths": []}, "data.max_length is 300 but the model's max_length is 256"),
        ({"init": {"weights": []}, "lora": {}}, "init.weights is empty"),
        (
            factors({r"^vision_tower\.": 0.1}),
            r"'\^vision_tower.*' matches no parameter that trains; .*vision_tower_from_layer",
        ),
        (
            factors({r"^vison_tower\.": 0.1}),
            r"factors: '\^vison_tower.*' matches no name; some names are vision_tower",
        ),
        (
            factors({r"^mm_": 0.1, r"^mm_projector\.": 2}),
            r"'\^mm_projector.*' matches only what an earlier pattern matches",
        ),
        (
            factors({r"^mm_projector\.": 2}) | {"model_changes": {"model": {"tune": {"connector": False}}}},
            r"'\^mm_projector.*' matches no parameter that trains",
        ),
        ({"model_changes": {"model": {"tune": {"embed_tokens": True}}}}, "model.tune.embed_tokens is true but"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        Trainer(llava_job(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_the_tower_has_a_learning_rate_of_its_own(tmp_path):
    """`vision_tower_lr`: Adam's first step is as large as the rate, whatever the gradient."""
    moved = {}
    for factor in (1.0, 0.1, 0.0):
        folder = tmp_path / str(factor)
        folder.mkdir()
        changes = factors({r"^vision_tower\.": factor}) | {"model_changes": SHARE, "schedule__total_steps": 1}
        trainer = Trainer(llava_job(folder, **changes))
        before = {name: p.asnumpy().copy() for name, p in trainer.model.parameters_and_names()}
        trainer.train()
        for name, parameter in trainer.model.parameters_and_names():
            moved[factor, name] = np.abs(parameter.asnumpy() - before[name]).max()
    for name in (
        "vision_tower.encoder.layers.1.mlp.fc1.weight",
        "vision_tower.encoder.layers.2.self_attn.q_proj.weight",
    ):
        assert 1e-4 < moved[1.0, name] < 2e-3 and moved[0.0, name] == 0
        assert moved[0.1, name] == pytest.approx(0.1 * moved[1.0, name], rel=0.01)
    for name in ("mm_projector.0.weight", "language_model.layers.0.mlp.up_proj.weight"):
        assert moved[0.0, name] == moved[0.1, name] == moved[1.0, name] > 0


def test_an_exception_from_decay_that_is_found_nowhere_is_said(tmp_path, said):
    job = llava_job(
        tmp_path, freeze=[r"^language_model\."], optimizer__no_decay=["bias$", r"^language_model.*norm", r"layr_norm"]
    )
    Trainer(job)
    found = [line for line in said if "no_decay" in line]
    assert len(found) == 1 and "'layr_norm' matches no name and has no effect" in found[0]
    assert "layer_norm1" in found[0].split("some names are")[1]


def test_rendered_text_is_for_vary(tmp_path):
    config = llava_job(tmp_path, data=None, rendered_text={}).config
    model_config = building.read_model(config)
    with pytest.raises(UserError, match="rendered_text has no form for the family 'tinyllava'"):
        building.open_data(config, model_config, get_family("tinyllava"), Mesh())


def test_weights_of_parts_make_a_whole(tmp_path):
    """A language model and a tower of their own, as a pre-training starts from them."""
    tensors = hf_tensors(hf_config("llama"), "llama")
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    prefix = "model.vision_tower.vision_tower."
    llm = {name: array for name, array in tensors.items() if not name.startswith(("model.vision", "model.mm_"))}
    tower = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    config = hf_config("llama")
    description = {key: value for key, value in config.items() if not key.startswith(("mm_", "vision", "image"))}
    for name, arrays, text in (("llm", llm, description | plain), ("tower", tower, config["vision_config"])):
        (tmp_path / name).mkdir()
        save_file(arrays, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(text))
    write_piece_files(tmp_path / "llm")
    job = llava_job(
        tmp_path,
        init={"weights": ["llm", "tower"], "random": [r"^mm_projector\."]},
        model_config="llm",
        model_changes={
            "vision_tower": "tower",
            "model": {"connector": {"type": "mlp2x_gelu"}},
            "processor": {"template": "plain"},
        },
    )
    model, _ = built(job)
    parameters = dict(model.parameters_and_names())
    np.testing.assert_array_equal(
        parameters["vision_tower.encoder.layers.2.mlp.fc1.weight"].asnumpy(),
        tensors[f"{prefix}vision_model.encoder.layers.2.mlp.fc1.weight"],
    )
    np.testing.assert_array_equal(parameters["language_model.lm_head.weight"].asnumpy(), tensors["lm_head.weight"])
    assert parameters["mm_projector.0.weight"].shape == (32, 16)
