"""Initial values of a TinyLLaVA training: rows of new tokens, norms of a resampler, the row that ends lines."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.pretrained import ROW_TABLES, fit_pretrained
from mindvlm.nn.norm import norm_weights
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.training.test_tinyllava_job import built, llava_job, train

NUM_TOKENS, NUM_ROWS = 330, 340
MARKS = {
    "model": {"language_model": {"vocab_size": NUM_ROWS}},
    "processor": {"vocab_size": NUM_ROWS, "use_im_start_end": True},
}
RESAMPLER = {
    "connector": {"type": "resampler", "resampler_hidden_size": 24, "num_queries": 3, "num_resampler_layers": 2},
    "image_token_len": 3,
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ROW_TABLES)
@pytest.mark.parametrize("num_rows", [9, 10, 11, 12, 14])
def test_new_marks_start_as_the_mean_row_however_long_the_table_is(name, num_rows):
    """Nine tokens and the two new ones, in a model of 12 rows."""
    width = () if name.endswith("bias") else (4,)
    table = noise(num_rows, *width)
    kept = table.copy()
    out = fit_pretrained(name, table, {name: (12, *width)}, new_ids=[9, 10], description={})
    np.testing.assert_array_equal(table, kept)
    np.testing.assert_array_equal(out[:9], table[:9])
    np.testing.assert_allclose(out[9:11], np.repeat(table[None, :9].mean(1), 2, 0), atol=1e-6)
    assert out.shape == (12, *width) and out.dtype == np.float32
    if num_rows >= 12:
        np.testing.assert_array_equal(out[11], table[11])


@pytest.mark.parametrize("name", ROW_TABLES)
def test_a_vocabulary_longer_than_the_tokenizer_is_cut(name):
    """The bias of a Phi's head, which TinyLLaVA Factory keeps, has a row for each token too."""
    table = noise(12) if name.endswith("bias") else noise(12, 4)
    np.testing.assert_array_equal(fit_pretrained(name, table, {name: (9, *table.shape[1:])}), table[:9])


def test_trained_marks_keep_their_rows():
    name, table = ROW_TABLES[0], noise(12, 4)
    shapes = {name: (12, 4), "norm": (4,)}
    assert fit_pretrained(name, table, shapes, new_ids=[9, 10], description={"mm_use_im_start_end": True}) is table
    assert fit_pretrained(name, table, shapes, new_ids=[], description={}) is table
    assert fit_pretrained("norm", noise(4), shapes, new_ids=[0, 1], description={}).tolist() == noise(4).tolist()
    with pytest.warns(UserWarning, match="no config.json beside .* whether <im_start> and <im_end> were trained"):
        assert fit_pretrained(name, table, shapes, new_ids=[9, 10]) is table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # such a table has no row for them
        assert np.allclose(fit_pretrained(name, table[:9], shapes, new_ids=[9, 10])[9], table[:9].mean(0), atol=1e-6)


def test_marks_that_a_pre_trained_model_lacks_are_the_mean_and_stay_what_they_became(tmp_path):
    """From a published table with rows that no token has; then from what that training leaves."""
    job = llava_job(tmp_path, model_changes=MARKS, schedule__total_steps=1)
    write_tiny_tinyllava(tmp_path, vocab_size=NUM_ROWS)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    names = dict(zip(ROW_TABLES[:2], ("model.embed_tokens.weight", "lm_head.weight"), strict=True))
    first = dict(built(job)[0].parameters_and_names())
    for name, original in names.items():
        values, rows = first[name].asnumpy(), stored[original]
        mean = rows[:NUM_TOKENS].mean(0)
        np.testing.assert_allclose(values[NUM_TOKENS : NUM_TOKENS + 2], np.stack([mean, mean]), atol=1e-6)
        np.testing.assert_array_equal(np.delete(values, [330, 331], 0), np.delete(rows, [330, 331], 0))
    train(job)
    left = load_file(tmp_path / "run" / "step-1" / "weights.safetensors")
    assert json.loads((tmp_path / "run" / "step-1" / "config.json").read_text())["mm_use_im_start_end"] is True
    job.config.init.weights = [str(tmp_path / "run" / "step-1")]
    again = dict(built(job)[0].parameters_and_names())
    for name in names:
        assert not np.array_equal(left[name], first[name].asnumpy())
        np.testing.assert_array_equal(again[name].asnumpy(), left[name])


def test_an_adapter_cannot_stand_on_rows_that_no_file_has(tmp_path):
    job = llava_job(tmp_path, model_changes=MARKS, lora={"targets": [r"^language_model\.layers\."]})
    write_tiny_tinyllava(tmp_path, vocab_size=NUM_ROWS)
    with pytest.raises(UserError, match=r"do not have language_model.embed_tokens.weight .*\(2 such tensors\)"):
        built(job)


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
