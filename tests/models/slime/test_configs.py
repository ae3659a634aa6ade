"""The shipped YAMLs describe the released models."""

from pathlib import Path

import pytest

import mindvlm.configs
from mindvlm.core.errors import UserError
from mindvlm.models.run_config import read_config
from mindvlm.models.slime import released
from mindvlm.models.slime.hf_config import from_hf_config

FOLDER = Path(mindvlm.configs.__file__).parent / "slime"
RELEASED = {"7b": "vicuna_7b", "8b": "llama3_8b", "13b": "vicuna_13b", "70b": "llama3_70b"}


@pytest.mark.parametrize("size", RELEASED)
def test_a_config_is_that_of_the_released_model(size):
    config = read_config(FOLDER / f"slime_{size}.yaml")
    assert config.model == from_hf_config(getattr(released, f"{RELEASED[size]}_config")())
    assert config.processor.template == ("v1" if size in ("7b", "13b") else "llama3")
    assert config.model.image_token_len == 1585


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("    size: 336", "processor.views.size is 300 but model.vision_tower.image_size is 336"),
        (
            "num_global_tokens: 576",
            "processor.views.num_global_tokens is 300 but model.vision_tower.num_patches is 576",
        ),
        ("top_p: 0.95", "model.router.top_p is 300.0; expected 0"),
        ("separator_id: 1919", "config key 'model.separator_id' is 'x'"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, key, message):
    # "size" ends other keys too
    name = key.split(":")[0]
    text = (FOLDER / "slime_7b.yaml").read_text().replace(key, f"{name}: {'x' if 'separator' in key else 300}")
    (tmp_path / "slime.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path / "slime.yaml")
    assert message in str(caught.value)
