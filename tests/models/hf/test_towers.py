"""Published towers by name, defaults of a config.json that says little, and the way back."""

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.hf.tower_folder import with_tower_config
from mindvlm.models.hf.towers import CLIP_224, CLIP_336, SIGLIP_384, published_tower, read_tower, tower_keys
from mindvlm.weights.config_json import ConfigTable


@pytest.mark.parametrize(
    ("name", "tower", "num_tokens"),
    [
        ("google/siglip-so400m-patch14-384", SIGLIP_384, 729),
        ("bczhou/TinyLLaVA-3.1B-SigLIP", SIGLIP_384, 729),
        ("openai/clip-vit-large-patch14-336", CLIP_336, 577),
        ("openai/clip-vit-large-patch14", CLIP_224, 257),
        ("some/tower", None, None),
    ],
)
def test_published_towers_are_known_everywhere(tmp_path, name, tower, num_tokens):
    """By the reader of a folder and by conversion alike."""
    assert published_tower(name) == tower
    assert with_tower_config({"mm_vision_tower": name}, tmp_path).get("vision_config") == tower
    if tower:
        assert read_tower(ConfigTable(tower)).num_tokens == num_tokens


@pytest.mark.parametrize("deletes_last_layer", [True, False])
@pytest.mark.parametrize("tower", [SIGLIP_384, CLIP_224])
def test_what_is_written_is_read_again(tower, deletes_last_layer):
    config = read_tower(ConfigTable(tower), deletes_last_layer=deletes_last_layer)
    is_deleted = config.dialect == "siglip" and deletes_last_layer
    assert config.num_hidden_layers == tower["num_hidden_layers"] - is_deleted
    assert tower_keys(config, deletes_last_layer=deletes_last_layer) == tower


def test_a_siglip_has_all_its_layers_by_default():
    config = read_tower(ConfigTable(SIGLIP_384))
    assert config.num_hidden_layers == SIGLIP_384["num_hidden_layers"] and tower_keys(config) == SIGLIP_384


def test_a_whole_clip_or_siglip_has_its_tower_inside():
    for kind, tower in (("siglip", SIGLIP_384), ("clip", CLIP_336)):
        inner = {key: value for key, value in tower.items() if key not in ("model_type", "num_attention_heads")}
        whole = {"model_type": kind, "vision_config": {**inner, "hidden_size": 32}}
        assert read_tower(ConfigTable(whole)) == read_tower(ConfigTable({**tower, "hidden_size": 32}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"patch_size": 0}, "patch_size is 0, expected a whole number"),
        ({"num_channels": 4}, "num_channels is 4; only 3 is supported"),
        ({"hidden_act": 3}, "hidden_act is 3, expected a text"),
    ],
)
def test_a_wrong_value_is_named(changes, named):
    with pytest.raises(UserError, match=f"config.json: {named}"):
        read_tower(ConfigTable({**CLIP_224, **changes}))
