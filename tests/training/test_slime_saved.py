"""What a training of SliME starts from and leaves: fresh adapters, config.json, files of single parts, adapters."""

import json
from pathlib import Path

import numpy as np
import pytest

import mindvlm
from mindvlm.models.registry import get_family
from mindvlm.models.slime.positions import sine_table
from tests.tiny_slime import CONFIG, write_tiny_slime
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
    files = get_family("slime").companions(config)
    assert {"config.json", "tokenizer.model", "tokenizer_config.json"} <= set(files)
    (tmp_path / "again").mkdir()
    for name, content in files.items():
        (tmp_path / "again" / name).write_bytes(content)
    found = mindvlm.api.read_config(tmp_path / "again")
    assert found.model == config.model
    assert {**vars(found.processor), "tokenizer": ""} == {**vars(config.processor), "tokenizer": ""}
    written, expected = json.loads(files["config.json"]), {**CONFIG, **changes, "mm_vision_tower": "clip"}
    assert {key: written[key] for key in expected} == expected


def test_fresh_adapters_start_as_in_the_original(tmp_path):
    """The queries are small, the gate is even, the positions are fixed."""
    job = slime_job(tmp_path, init={"weights": ["model"]}, model_changes={"vision_tower": "vision_tower"})
    job.config.init.weights, job.config.model_changes = [], {}
    values = {name: parameter.asnumpy() for name, parameter in built(job)[0].parameters_and_names()}
    for part, grid in (("mm_projector.attn", 4), ("sampler", 2)):
        positions = sine_table(128, grid).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(values[f"{part}.pos_embed"], positions)
        assert 0.018 < values[f"{part}.query"].std() < 0.022
        np.testing.assert_array_equal(values[f"{part}.ln_kv.weight"], 1)
    assert not values["mm_projector.w_gate"].any() and not values["mm_projector.w_noise"].any()
