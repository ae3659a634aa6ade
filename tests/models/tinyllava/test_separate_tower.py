"""Tower weights from a separate repository: precedence of files, unused tensors of published towers, errors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.tools import predict_llm
from tests.hf_shapes import tower_shapes
from tests.tiny_tinyllava import TOWER, hf_tensors, write_tiny_tinyllava
from tests.tools.refusals import assert_refused

CLIP = {**TOWER, "model_type": "clip_vision_model", "num_hidden_layers": 3, "hidden_act": "quick_gelu"}
PREFIX = "model.vision_tower.vision_tower."
A_WEIGHT = "encoder.layers.1.mlp.fc1.weight"


def write_tower(folder, tower=TOWER, *, seed=9, whole=False, **changes):
    """A tower's repository; `whole` as google and openai publish it, with text half, head, buffers and last layer."""
    rng = np.random.default_rng(seed)
    tower = {**tower, **changes}
    tensors = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in tower_shapes(tower, keeps_last_layer=whole).items()
    }
    config = tower
    if whole:
        kind = tower["model_type"].removesuffix("_vision_model")
        extra = ("text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale", "vision_model.embeddings.position_ids")
        extra += ("vision_model.head.probe", "logit_bias") if kind == "siglip" else ("visual_projection.weight",)
        tensors |= {name: np.ones(3, np.float32) for name in extra}
        config = {"model_type": kind, "text_config": {"model_type": f"{kind}_text_model"}, "vision_config": tower}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def remove_tower(model) -> None:
    """Takes tower and its description out of a folder, as a main file without them is published."""
    tensors = load_file(model / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    assert len(kept) < len(tensors)
    save_file(kept, model / "model.safetensors")
    edit_config(model, vision_config=None)


def edit_config(model, **changes) -> None:
    """Changes keys of a config.json; None removes one."""
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def parameters(folder, **options) -> dict[str, np.ndarray]:
    loaded = mindvlm.load(folder, mode="pynative", weights="float32", **options)
    return {name: parameter.asnumpy() for name, parameter in loaded.model.parameters_and_names()}


def tower_of(values: dict) -> dict[str, np.ndarray]:
    prefix = "vision_tower."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def assert_tower(values: dict, folder, *, left_out: tuple[str, ...] = ()) -> None:
    """The model's tower has exactly the values of the repository's, but for what is left out of that."""
    theirs = load_file(folder / "model.safetensors")
    theirs = {
        name.removeprefix("vision_model."): value
        for name, value in theirs.items()
        if name.startswith("vision_model.") and not name.removeprefix("vision_model.").startswith(left_out)
    }
    ours = tower_of(values)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.fixture
def model(tmp_path):
    return write_tiny_tinyllava(tmp_path)


def test_a_main_file_without_a_tower(model, tmp_path):
    whole = parameters(model)
    remove_tower(model)
    tower = write_tower(tmp_path / "siglip")
    values = parameters(model, vision_tower=tower)
    assert_tower(values, tower)
    for name in whole.keys() - {f"vision_tower.{key}" for key in tower_of(whole)}:
        np.testing.assert_array_equal(values[name], whole[name], err_msg=name)


@pytest.mark.parametrize("is_beside", [True, False])
def test_the_folder_that_the_config_names(model, tmp_path, monkeypatch, is_beside):
    remove_tower(model)
    edit_config(model, mm_vision_tower="towers/a-siglip")
    monkeypatch.chdir(tmp_path)
    tower = write_tower((model if is_beside else tmp_path) / "towers/a-siglip")
    assert_tower(parameters(model), tower)


def test_the_main_file_wins_unless_the_caller_names_a_tower(model, tmp_path):
    edit_config(model, mm_vision_tower=str(write_tower(tmp_path / "siglip")))
    main = load_file(model / "model.safetensors")
    np.testing.assert_array_equal(tower_of(parameters(model))[A_WEIGHT], main[f"{PREFIX}vision_model.{A_WEIGHT}"])
    assert_tower(parameters(model, vision_tower=tmp_path / "siglip"), tmp_path / "siglip")


@pytest.mark.parametrize("has_tower", [True, False])
def test_a_siglip_as_google_publishes_it(model, tmp_path, has_tower):
    """The text half, the pooling head and the last layer are left out."""
    if not has_tower:
        remove_tower(model)
    tower = write_tower(tmp_path / "siglip", whole=True)
    assert any(".layers.3." in name for name in load_file(tower / "model.safetensors"))
    left_out = ("encoder.layers.3.", "head.", "embeddings.position_ids")
    assert_tower(parameters(model, vision_tower=tower), tower, left_out=left_out)


def test_a_clip_as_openai_publishes_it(tmp_path):
    """All layers are there, though the last one has no part in the feature."""
    model = write_tiny_tinyllava(tmp_path, vision_config=CLIP, mm_vision_tower="clip")
    remove_tower(model)
    tower = write_tower(tmp_path / "clip", CLIP, whole=True)
    assert_tower(parameters(model, vision_tower=tower), tower, left_out=("embeddings.position_ids",))


@pytest.mark.parametrize("is_described_beside", [True, False])
def test_the_tower_of_another_model(model, tmp_path, is_described_beside):
    other = write_tiny_tinyllava(tmp_path / "other", seed=5)
    values = tower_of(parameters(other))
    if is_described_beside:
        edit_config(other, vision_config=None)
        (other / "vision_config.json").write_text(json.dumps(TOWER))
    taken = parameters(model, vision_tower=other)
    np.testing.assert_array_equal(tower_of(taken)[A_WEIGHT], values[A_WEIGHT])
    main = hf_tensors(json.loads((model / "config.json").read_text()), "llama")
    np.testing.assert_array_equal(taken["mm_projector.0.weight"], main["model.mm_projector.0.weight"])


def test_a_description_alone_replaces_no_weights(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    whole = parameters(model)
    for place in (tmp_path, tmp_path / "config.json"):
        np.testing.assert_array_equal(
            tower_of(parameters(model, vision_tower=place))[A_WEIGHT], tower_of(whole)[A_WEIGHT]
        )


def test_no_tower_anywhere(model):
    remove_tower(model)
    edit_config(model, vision_config=TOWER)
    with pytest.raises(
        UserError, match="model.safetensors: holds no vision tower; .*; give the folder of .* vision_tower"
    ):
        mindvlm.load(model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"intermediate_size": 20}, ["shape", "mlp.fc1.weight", "[20, 16]", "[24, 16]"]),
        ({"num_hidden_layers": 3}, ["missing", "vision_tower.encoder.layers.2."]),
        ({"num_hidden_layers": 6}, ["unexpected", "vision_tower.encoder.layers."]),
    ],
)
def test_a_tower_that_does_not_fit(model, tmp_path, changes, expected):
    """The description is that of the checkpoint, as where a folder's config.json is of another tower."""
    remove_tower(model)
    tower = write_tower(tmp_path / "siglip", **changes)
    (tower / "config.json").write_text(json.dumps(TOWER))
    with pytest.raises(UserError) as error:
        mindvlm.load(model, vision_tower=tower)
    for text in ("siglip", *expected):
        assert text in str(error.value)


def test_the_tool_takes_a_tower(model, tmp_path, capsys):
    def run(*argv):
        return predict_llm.main([str(argument) for argument in argv]), *capsys.readouterr()

    remove_tower(model)
    tower = write_tower(tmp_path / "siglip")
    arguments = ("--config_path", model, "--query", "the cup", "--max_new_tokens", 1, "--mode", "pynative")
    status, _, err = run(*arguments, "--vision_tower", tower)
    assert status == 0 and f"loading {model / 'model.safetensors'} with {tower}" in err
    assert_refused(run(*arguments, "--vision_tower", tmp_path / "nowhere"), "nowhere", "give a tower's folder")


def test_a_changed_tower_is_converted_again(model, tmp_path):
    tower = write_tower(tmp_path / "siglip")
    for turn in ("converting", "loading"):
        lines = []
        assert_tower(parameters(model, vision_tower=tower, progress=lines.append), tower)
        assert lines[0].startswith(turn)
    write_tower(tmp_path / "other", seed=10)
    (tmp_path / "other/model.safetensors").replace(tower / "model.safetensors")
    assert_tower(parameters(model, vision_tower=tower), tower)
