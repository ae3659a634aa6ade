import numpy as np
import pytest
import torch

from mindvlm.core.errors import UserError
from mindvlm.models.vary.pretrained import HEAD, POSITIONS, TOKENS, fit_pretrained
from mindvlm.nn.resize_tables import interpolate_positions, resize_embeddings


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), [(2048, 4096), (20, 33), (20, 7), (1, 5), (5, 1)])
def test_positions_are_interpolated_as_torch_does_it(old, new):
    table = noise(old + 2, 6)
    rows = torch.from_numpy(table[2:].T[None].copy())
    expected = torch.nn.functional.interpolate(rows, size=new, mode="linear", align_corners=False)[0].T.numpy()
    out = interpolate_positions(table, new)
    assert out.shape == (new + 2, 6) and out.dtype == np.float32
    np.testing.assert_array_equal(out[:2], table[:2])
    np.testing.assert_allclose(out[2:], expected, atol=1e-5)


def test_the_context_of_opt_doubles():
    assert interpolate_positions(np.zeros((2050, 4), np.float16), 4096).shape == (4098, 4)
    assert interpolate_positions(np.zeros((2050, 4), np.float16), 4096).dtype == np.float16


def test_the_same_number_of_positions_changes_nothing():
    table = noise(22, 3)
    assert interpolate_positions(table, 20) is table


def test_without_offset_rows():
    np.testing.assert_allclose(
        interpolate_positions(np.array([[0.0], [1.0]]), 4, num_offset_rows=0)[:, 0], [0, 0.25, 0.75, 1]
    )


@pytest.mark.parametrize(("rows", "new"), [(2, 5), (1, 5), (9, 0)])
def test_impossible_positions(rows, new):
    with pytest.raises(UserError, match="positions: cannot resize a table of"):
        interpolate_positions(np.zeros((rows, 2), np.float32), new)


@pytest.mark.parametrize("num_rows", [7, 10, 14])
def test_the_last_tokens_start_as_the_mean(num_rows):
    table = noise(10, 3)
    out = resize_embeddings(table, num_rows, num_mean_rows=2)
    kept = min(10, num_rows - 2)
    np.testing.assert_array_equal(out[:kept], table[:kept])
    assert out.shape == (num_rows, 3) and np.abs(out[kept:]).max() < 1
    np.testing.assert_allclose(out[-2:], np.repeat(out[:-2].mean(0)[None], 2, 0), atol=1e-6)


def test_new_tokens_are_those_of_the_seed():
    first, again, other = (resize_embeddings(noise(4, 3), 9, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(UserError, match="cannot resize to 2 rows; expected more than 2"):
        resize_embeddings(noise(4, 3), 2, num_mean_rows=2)


def test_opt_is_fitted_to_vary_tiny():
    shapes = {POSITIONS: (4098, 8), TOKENS: (46, 8), "language_model.norm.weight": (8,)}
    assert fit_pretrained(POSITIONS, np.zeros((2050, 8), np.float32), shapes).shape == (4098, 8)
    fitted = fit_pretrained(TOKENS, noise(50, 8), shapes)
    np.testing.assert_allclose(fitted[-1], fitted[:44].mean(0), atol=1e-6)
    same = noise(46, 8)
    assert fit_pretrained(TOKENS, same, shapes) is same
    for name, array in ((POSITIONS, noise(12, 4)), ("language_model.norm.weight", noise(4))):
        with pytest.raises(UserError, match=f"tensor {name} has shape .*; the model expects "):
            fit_pretrained(name, array, shapes)


@pytest.mark.parametrize("name", [TOKENS, HEAD])
def test_qwen_is_fitted_to_vary_toy(name):
    shapes = {TOKENS: (12, 8), HEAD: (12, 8)}
    table = noise(16, 8)
    np.testing.assert_array_equal(fit_pretrained(name, table, shapes), table[:12])
    longer = fit_pretrained(name, table[:10], shapes, seed=3)
    np.testing.assert_array_equal(longer[:10], table[:10])
    assert longer.shape == (12, 8) and 0 < np.abs(longer[10:]).max() < 0.2
    assert np.abs(longer[10:] - fit_pretrained(name, table[:10], shapes, seed=4)[10:]).max() > 0
    with pytest.raises(UserError, match="the model expects"):
        fit_pretrained(name, noise(16, 4), shapes)


def test_new_rows_of_tokens_and_head_differ():
    shapes = {TOKENS: (12, 8), HEAD: (12, 8)}
    tokens, head = (fit_pretrained(name, noise(10, 8), shapes, seed=1) for name in (TOKENS, HEAD))
    assert not np.array_equal(tokens[10:], head[10:])
