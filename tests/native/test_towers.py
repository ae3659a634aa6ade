"""The kernels of vision towers against formulas in float64."""

import math
import re

import numpy as np
import pytest

from mindvlm.native.build import SOURCES
from mindvlm.native.library import Matrix
from tests.native.operators import call

pytest_plugins = ("tests.native.operators",)

# from the sources, because these tests also run where there is no MindSpore
ACTIVATION_KERNELS = re.search(r"enum class Activation.*{ (.*) }", (SOURCES / "towers.h").read_text())[1].split(", ")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def heads(x: np.ndarray, num_heads: int) -> np.ndarray:
    """(N, T, H * D) -> (N, H, T, D) float64."""
    return x.astype(np.float64).reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def attended(query, key, value, bias=0.0) -> np.ndarray:
    """(N, H, T, D) each -> (N, T, H * D)."""
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]) + bias
    out = (softmax(scores) @ value).transpose(0, 2, 1, 3)
    return out.reshape(*out.shape[:2], -1)


def require_close(found: np.ndarray, expected: np.ndarray, largest: float = 2e-6) -> None:
    assert np.linalg.norm(found - expected) <= largest * np.linalg.norm(expected)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 5])
@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(1, 257, 257), (2, 3, 577), (3, 1, 1), (1, 49, 729)])
def test_attention_to_all_tokens(library, head_dim, batch, num_queries, num_keys):
    num_heads = 2
    width = num_heads * head_dim
    query, key, value = 3 * noise(batch, num_queries, width), noise(batch, num_keys, width, seed=1), None
    value = noise(batch, num_keys, width, seed=2)
    found = call(library, "MindvlmAttendAll", query.shape, query, key, value, np.array([num_heads], np.int32))
    require_close(found, attended(*(heads(x, num_heads) for x in (query, key, value))))


@pytest.mark.parametrize("kind", ACTIVATION_KERNELS[1:])
def test_activations_keep_nan(library, kind):
    x = noise(1, 37)
    x[0, ::9] = np.nan
    found = call(library, "MindvlmActivation", x.shape, x, np.array([ACTIVATION_KERNELS.index(kind)], np.int32))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))


def test_attention_keeps_nan_scores(library):
    query, key, value = noise(1, 3, 32), noise(1, 40, 32), noise(1, 40, 32)
    key[0, 17] = np.nan
    assert np.isnan(call(library, "MindvlmAttendAll", query.shape, query, key, value, np.array([1], np.int32))).all()


def test_attention_without_images(library):
    empty = np.zeros((0, 3, 32), np.float32)
    assert call(library, "MindvlmAttendAll", empty.shape, empty, empty, empty, np.array([2], np.int32)).size == 0


def test_large_scores_of_late_keys(library):
    query, key = np.ones((1, 5, 32), np.float32), noise(1, 700, 32)
    key[0, 650] = 60.0
    value = noise(1, 700, 32, seed=1)
    found = call(library, "MindvlmAttendAll", query.shape, query, key, value, np.array([1], np.int32))
    require_close(found, np.tile(value[:, 650:651], (1, 5, 1)))
    key[0, 650] = -60.0
    found = call(library, "MindvlmAttendAll", query.shape, query, key, value, np.array([1], np.int32))
    require_close(found, attended(*(heads(x, 1) for x in (query, key, value))))


def grid_attention(qkv, padding, row_table, column_table, num_heads: int) -> np.ndarray:
    """SAM's attention within windows, one window after another."""
    num_images, rows, columns, width = qkv.shape
    size = [(len(table) + 1) // 2 for table in (row_table, column_table)]
    padded = [-(-length // step) * step for length, step in zip((rows, columns), size, strict=True)]
    whole = np.tile(padding.astype(np.float64), (num_images, *padded, 1))
    whole[:, :rows, :columns] = qkv
    out = np.zeros((num_images, *padded, width // 3))
    row, column = np.divmod(np.arange(size[0] * size[1]), size[1])
    by_row = row_table.astype(np.float64)[row[:, None] - row + size[0] - 1]
    by_column = column_table.astype(np.float64)[column[:, None] - column + size[1] - 1]
    for top in range(0, padded[0], size[0]):
        for left in range(0, padded[1], size[1]):
            place = np.s_[:, top : top + size[0], left : left + size[1]]
            query, key, value = (
                heads(part.reshape(num_images, len(row), -1), num_heads) for part in np.split(whole[place], 3, -1)
            )
            bias = np.einsum("nhqd,qkd->nhqk", query, by_row + by_column)
            out[place] = attended(query, key, value, bias).reshape(num_images, *size, -1)
    return out[:, :rows, :columns]


@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize(
    ("batch", "grid", "window"),
    # windows of the size of the grid, padded ones, and a grid smaller than its windows
    [
        (1, (16, 16), (16, 16)),
        (2, (9, 13), (4, 4)),
        (1, (20, 30), (14, 14)),
        (1, (7, 40), (7, 40)),
        (1, (1, 5), (3, 2)),
    ],
)
def test_attention_in_windows_with_relative_positions(library, head_dim, batch, grid, window):
    num_heads = 2
    width = 3 * num_heads * head_dim
    qkv, padding = noise(batch, *grid, width), noise(width, seed=1)
    tables = [noise(2 * size - 1, head_dim, seed=2 + axis) / 4 for axis, size in enumerate(window)]
    found = call(library, "MindvlmAttendGrid", (batch, *grid, width // 3), qkv, padding, *tables)
    require_close(found, grid_attention(qkv, padding, *tables, num_heads))


@pytest.mark.parametrize("shape", [(7,), (3, 1, 7)])
def test_angles(library, shape):
    positions = np.random.default_rng(1).integers(0, 5000, (3, 41)).astype(np.int32)
    frequencies = np.random.default_rng(2).random(shape).astype(np.float32)
    cos, sin = call(library, "MindvlmAngles", (3, 41, 14), positions, frequencies, num_outputs=2)
    angles = positions[..., None].astype(np.float32) * np.concatenate((frequencies, frequencies), -1)
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), rtol=0, atol=2e-7)
    one, _ = call(
        library,
        "MindvlmAngles",
        (1, 1, 14),
        positions[1:2, 5:6],
        frequencies[1:2] if shape[1:] else frequencies,
        num_outputs=2,
    )
    np.testing.assert_array_equal(one[0, 0], cos[1, 5])


def test_parts_of_a_large_head(library):
    qkv, padding = noise(1, 36, 20, 48), noise(48, seed=1)
    tables = noise(71, 16, seed=2), noise(39, 16, seed=3)
    found = call(library, "MindvlmAttendGrid", (1, 36, 20, 16), qkv, padding, *tables)
    require_close(found, grid_attention(qkv, padding, *tables, 1))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "gelu": lambda x: x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
    "tanh_gelu": lambda x: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("kernel", ACTIVATIONS)
def test_activations(library, kernel):
    x = np.concatenate([np.linspace(-12, 12, 4999), [0.0, -0.0, 1e-30, -300.0, 300.0]]).astype(np.float32)
    expected = ACTIVATIONS[kernel](np.clip(x, -20, None).astype(np.float64))
    kind = np.array([ACTIVATION_KERNELS.index(kernel)], np.int32)
    found = call(library, "MindvlmActivation", (3, 1668), x.reshape(3, 1668), kind).reshape(-1)
    assert (np.abs(found - expected) / np.maximum(1, np.abs(x))).max() < 3e-7
    assert found[-1] == 300.0 and abs(found[-2]) < 1e-30


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_block_of_more_rows_than_are_computed_at_a_time(library, has_bias):
    x, weights = noise(2, 550, 40), (noise(56, 40, seed=1), noise(24, 56, seed=2))
    biases = [noise(len(weight), seed=3) for weight in weights]
    matrices = [Matrix.of_floats(library, weight, "float32") for weight in weights]
    inputs = [np.array([matrix.handle]) for matrix in matrices]
    inputs += [np.array([ACTIVATION_KERNELS.index("gelu")], np.int32), *(biases if has_bias else [])]
    found = call(library, "MindvlmMlp", (2, 550, 24), x, *inputs)
    first, second = biases if has_bias else (0, 0)
    hidden = ACTIVATIONS["gelu"](x.astype(np.float64) @ weights[0].T + first)
    require_close(found, hidden @ weights[1].T + second)


@pytest.mark.parametrize("width", [1, 5, 64, 100, 1024])
def test_layer_norm(library, width):
    x, weight, bias = 5 + noise(7, width), noise(width, seed=1), noise(width, seed=2)
    found = call(library, "MindvlmLayerNorm", x.shape, x, weight, bias, np.array([1e-5], np.float32))
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    require_close(found, expected)
