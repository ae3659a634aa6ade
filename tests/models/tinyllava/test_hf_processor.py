import json

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.folder import processor_config, template_of
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.processor import TinyLlavaProcessor
from mindvlm.weights.config_json import ConfigTable, without_nulls
from tests.golden_files import golden_path

CHECKPOINTS = {"phi": "TinyLLaVA-3.1B", "stablelm": "TinyLLaVA-2.0B", "llama": "TinyLLaVA-1.5B"}


@pytest.mark.parametrize(
    ("model_type", "template"),
    [("tiny_llava_phi", "phi"), ("tiny_llava_stablelm", "phi"), ("tiny_llava", "v1"), ("tinyllava", "v1")],
)
def test_the_template_of_the_zoo(model_type, template):
    assert template_of(ConfigTable({"model_type": model_type})) == template
    assert template_of(ConfigTable({"model_type": "tinyllava", "text_config": {"model_type": "phi"}})) == "phi"


def config_of(dialect, **changes):
    folder = golden_path(f"tinyllava/e2e_{dialect}") / CHECKPOINTS[dialect]
    data = json.loads((folder / "config.json").read_text()) | changes
    return processor_config(ConfigTable(without_nulls(data)), folder, from_hf_config(data))


@pytest.mark.parametrize("dialect", CHECKPOINTS)
def test_a_checkpoint_has_its_processor(dialect):
    config = config_of(dialect)
    assert config.template == ("v1" if dialect == "llama" else "phi")
    assert (config.num_image_tokens, config.image.size, config.image.padding) == (729, 384, "centre")
    assert TinyLlavaProcessor(config).prompt("What?", num_images=1).input_ids.count(-200) == 729


def test_what_a_config_may_change():
    config = config_of("llama", mm_vision_tower="openai/clip-vit-large-patch14-336", mm_use_im_start_end=True)
    assert (config.image.size, config.image.resize, config.num_image_tokens) == (336, "crop", 576)
    assert config.use_im_start_end and not config.use_im_patch_token
    assert config_of("phi", image_aspect_ratio=None).image.padding == "none"


@pytest.mark.parametrize(
    "pinpoints", [[[384, 768], [768, 768]], "[(384, 768), (768, 768)]", "[[384, 768], [768, 768]]"]
)
def test_pictures_in_tiles(pinpoints):
    config = config_of("phi", image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    assert config.tiling.resolutions == [[384, 768], [768, 768]] and config.tiling.merge == "flat"
    assert config.image.padding == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "image_grid_pinpoints are \\[\\]; expected at least one"),
        ({"image_grid_pinpoints": "[(384, 768"}, "image_grid_pinpoints is .*; expected a list"),
        ({"image_grid_pinpoints": [[384]]}, "expected at least one \\[width, height\\]"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints is .*; expected a list"),
        (
            {"image_grid_pinpoints": [[384, 384]], "mm_patch_merge_type": "maxpool2x2"},
            "mm_patch_merge_type is 'maxpool2x2'; expected one of flat, spatial",
        ),
    ],
)
def test_tiles_that_are_described_wrongly(changes, message):
    with pytest.raises(UserError, match=message):
        config_of("phi", image_aspect_ratio="anyres", **changes)


def test_the_first_model():
    data = json.loads((golden_path("tinyllava/llama_clip_hf") / "config.json").read_text())
    config = processor_config(ConfigTable(without_nulls(data)), "folder", from_hf_config(data))
    assert (config.template, config.image.resize, config.image.padding) == ("llava_hf", "crop", "none")
    assert not config.use_im_patch_token
