"""Checkpoint folders as run configs; the recorded cases contain whole folders."""

import json

import pytest

from mindvlm.api import load, read_config
from mindvlm.core.errors import UserError
from mindvlm.models.hf.tower_folder import tower_config
from mindvlm.models.tinyllava.released import llama_config, phi_config
from mindvlm.weights.config_json import ConfigTable
from tests.tiny_tinyllava import write_tiny_tinyllava


def folder_with(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(UserError, match="has no config.json; give the folder of a checkpoint, or a YAML"):
        load(tmp_path)


def test_its_config_json_stands_for_the_folder(tmp_path):
    folder = write_tiny_tinyllava(tmp_path)
    assert read_config(folder / "config.json") == read_config(folder)


@pytest.mark.parametrize("config", [{"model_type": "mmgpt"}, {"model_type": "mixtral"}])
def test_a_folder_of_another_model(tmp_path, config):
    with pytest.raises(UserError, match="is not read from a folder; give a YAML for it"):
        load(folder_with(tmp_path, config))


@pytest.mark.parametrize(("config", "what"), [({}, "is an empty table"), ({"hidden_size": 8}, "names no model_type")])
def test_a_config_of_no_model(tmp_path, config, what):
    with pytest.raises(UserError, match=f"config.json: {what}; take the config.json of the model, or give a YAML"):
        load(folder_with(tmp_path, config))


def test_a_folder_of_a_language_model_alone(tmp_path):
    config = {key: value for key, value in llama_config().items() if not key.startswith(("mm_", "vision"))}
    with pytest.raises(UserError, match="describes only a part of a model"):
        load(folder_with(tmp_path, config))


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        read_config(folder_with(tmp_path, phi_config()))


def test_a_key_that_is_missing_is_named(tmp_path):
    config = phi_config()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="lacks 'intermediate_size'"):
        load(folder_with(tmp_path, config))


def test_where_the_tower_is_described(tmp_path):
    """In config.json itself, where the caller says, beside the weights, or by a published name."""
    inside = phi_config()
    outside = {key: value for key, value in inside.items() if key != "vision_config"}
    assert tower_config(ConfigTable(inside), tmp_path, None) is None
    assert tower_config(ConfigTable(outside), tmp_path, None)["hidden_size"] == 1152
    (tmp_path / "vision_config.json").write_text(json.dumps({"hidden_size": 24}))
    assert tower_config(ConfigTable(outside), tmp_path, None) == {"hidden_size": 24}
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"hidden_size": 36}))
    for place in (tower, tower / "config.json"):
        assert tower_config(ConfigTable(inside), tmp_path, place) == {"hidden_size": 36}


def test_sizes_beyond_the_memory(tmp_path, monkeypatch):
    folder = write_tiny_tinyllava(tmp_path)

    def fails(config, dtype):
        raise MemoryError("Unable to allocate 37.3 GiB")

    monkeypatch.setattr("mindvlm.models.tinyllava.model.CausalLM", fails)
    with pytest.raises(UserError, match=f"^{folder}: a model of these sizes does not fit into memory; correct them"):
        load(folder, mode="pynative", cache=False)
