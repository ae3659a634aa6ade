"""What a TinyLLaVA starts its training with: norms of a resampler, the row that ends lines."""

import numpy as np
import pytest

from mindvlm.models.common.norm import norm_weights
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.training.test_tinyllava_job import built, llava_job

RESAMPLER = {
    "connector": {"type": "resampler", "resampler_hidden_size": 24, "num_queries": 3, "num_resampler_layers": 2},
    "image_token_len": 3,
}


def test_every_norm_of_a_random_resampler_starts_as_one(tmp_path):
    changes = {"model": RESAMPLER, "processor": {"num_image_tokens": 3}}
    model, _ = built(
        llava_job(tmp_path, model_changes=changes, init={"weights": ["model"], "random": [r"^mm_projector\."]})
    )
    values = {name: parameter.asnumpy() for name, parameter in model.parameters_and_names()}
    norms = {name for name in norm_weights(model) if name.startswith("mm_projector.")}
    assert len(norms) == 7 and "mm_projector.resampler_blocks.1.feed_forward.0.weight" in norms
    for name in norms:
        np.testing.assert_array_equal(values[name], 1, err_msg=name)
        np.testing.assert_array_equal(values[name.replace("weight", "bias")], 0, err_msg=name)
    assert values["mm_projector.queries"].std() > 0


def with_newline(folder, **changes):
    job = llava_job(folder, **changes)
    write_tiny_tinyllava(folder, mm_patch_merge_type="spatial_unpad")
    return job


def test_the_row_that_ends_lines_starts_as_in_llava(tmp_path):
    job = with_newline(
        tmp_path, init={"weights": []}, model_changes={"model": {"language_model": {"hidden_size": 1024}}}
    )
    row = dict(built(job)[0].parameters_and_names())["image_newline"].asnumpy()
    assert row.shape == (1024,) and abs(row.std() * 32 - 1) < 0.1


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        ({}, True),
        ({"language_model": False}, True),
        ({"connector": False}, False),
        ({"language_model": False, "connector": False, "vision_tower_from_layer": 1}, False),
    ],
)
def test_the_row_that_ends_lines_trains_with_the_connector(tmp_path, tune, expected):
    model, _ = built(with_newline(tmp_path, model_changes={"model": {"tune": tune}}))
    trained = {parameter.name for parameter in model.trainable_params()}
    assert ("image_newline" in trained) == ("mm_projector.0.weight" in trained) == expected
