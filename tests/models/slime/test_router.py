"""The router: which rows are kept, and scores as sums of cosines."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.models.slime.model_config import RouterConfig
from mindvlm.models.slime.router import (
    kept_first,
    kept_mask,
    kept_rows,
    probabilities,
    router_scores,
    scores_on_host,
    text_direction,
)
from mindvlm.models.slime.views import ViewsConfig
from mindvlm.nn.image_text import ImageTextModel
from tests.tiny_slime import write_tiny_slime


def kept(scores, top_p=0.95, temperature=1.0):
    return kept_rows(np.array(scores, np.float32), RouterConfig(top_p=top_p, temperature=temperature)).tolist()


def test_the_row_that_exceeds_the_sum_is_kept():
    # probabilities .644, .237, .087, .032
    assert kept([2, 1, 0, -1]) == [0, 1, 2]
    assert kept([-1, 0, 1, 2]) == [1, 2, 3]
    assert kept([2, 1, 0, -1], top_p=0.6) == [0]
    assert kept([2, 1, 0, -1], top_p=0.65) == [0, 1]


def test_extremes_keep_one_row_or_all():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 0.1, 100)
    assert kept(scores, top_p=1.0) == list(range(100))
    assert kept(scores, top_p=0.0) == [int(scores.argmax())]
    assert kept([5.0]) == [0]
    assert kept([300, 0, 0], top_p=0.5) == [0]


def test_equal_scores_are_taken_in_order():
    assert kept([1, 1, 1, 1], top_p=0.4) == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_in_a_graph_is_the_same(seed):
    rng = np.random.default_rng(seed)
    num_rows, num_pictures, length = rng.integers(1, 4), rng.integers(1, 4), int(rng.integers(5, 80))
    config = RouterConfig(top_p=float(rng.choice([0, 0.3, 0.75, 0.95, 1])), temperature=float(rng.choice([0.25, 1, 4])))
    # every other case has many equal scores
    scores = rng.normal(0, 3, (num_rows, length)).astype(np.float32)
    scores = scores.round() if seed % 2 else scores
    owners = rng.integers(0, num_pictures + 1, (num_rows, length))
    owners[0, :] = 0
    members = np.stack([owners == k for k in range(1, num_pictures + 1)], 1)
    mask = kept_mask(Tensor(scores), Tensor(members), config).asnumpy()
    expected = np.zeros_like(members)
    for row in range(num_rows):
        for picture in range(num_pictures):
            places = np.flatnonzero(members[row, picture])
            own = scores[row, places]
            sums = np.cumsum(np.sort(probabilities(own, config))[::-1])
            if config.top_p < 1 and (np.abs(sums - config.top_p) < 1e-5).any():
                pytest.skip("a sum at the threshold is rounding")
            expected[row, picture, places[kept_rows(own, config)] if len(places) else []] = True
    np.testing.assert_array_equal(mask, expected)


def test_what_is_dropped_moves_behind_in_order():
    dropped = np.array([[False, True, False, True, False], [False] * 5])
    assert kept_first(Tensor(dropped)).asnumpy().tolist() == [[0, 2, 4, 1, 3], [0, 1, 2, 3, 4]]


def test_the_temperature_flattens():
    scores = [3, 2, 1, 0]
    assert len(kept(scores, top_p=0.8, temperature=0.2)) < len(kept(scores, top_p=0.8, temperature=10))


def test_scores_are_sums_of_cosines():
    rng = np.random.default_rng(1)
    rows, text = (rng.normal(size=(size, 16)).astype(np.float32) for size in (9, 5))
    text[3] = 0
    mask = np.array([1, 1, 0, 1, 1], np.float32)
    norms = np.maximum(np.linalg.norm(text, axis=1), 1e-8)
    cosines = rows @ (text / norms[:, None]).T / np.linalg.norm(rows, axis=1)[:, None]
    scores = router_scores(Tensor(rows), text_direction(Tensor(text), Tensor(mask))).asnumpy()
    np.testing.assert_allclose(scores, cosines @ mask, rtol=1e-5, atol=1e-6)
    on_host = scores_on_host(rows, text[mask > 0])
    np.testing.assert_allclose(on_host, scores, rtol=1e-5, atol=1e-6)
    assert on_host.dtype == np.float32 and not scores_on_host(rows, text[:0]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 1.5}, r"model.router.top_p is 1.5; expected 0 \(keeps one row\) to 1"),
        ({"top_p": -0.1}, "model.router.top_p is -0.1"),
        ({"temperature": 0.0}, "model.router.temperature is 0.0; expected a finite number above 0"),
        ({"noise": -1.0}, r"model.router.noise is -1.0; expected 0 \(none\) or a finite number above it"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        RouterConfig(**changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mindvlm.load(write_tiny_slime(tmp_path_factory.mktemp("tiny")), mode="graph").model


VIEWS = ViewsConfig(num_global_tokens=16, num_local_tokens=4)
FEATURES = Tensor(np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32))


def test_rows_of_a_picture_do_without_operators_that_keep_memory(model, monkeypatch):
    """On a CPU, some operators, such as a product outside of a graph, take memory that MindSpore does not free."""
    layout, text = VIEWS.layout((2, 1)), [5, 6, 7]
    with monkeypatch.context() as patch:
        for module in ("nn.rows", "models.slime.model"):
            patch.setattr(f"mindvlm.{module}.works_on_host", lambda: False)
        expected = model.picture_rows(FEATURES, layout, text).asnumpy()
    assert VIEWS.num_global_tokens + 1 < len(expected) < len(layout)
    for module in ("nn.rows", "nn.image_text", "models.slime.model", "models.slime.router"):
        monkeypatch.setattr(f"mindvlm.{module}.ops", None)
    np.testing.assert_array_equal(model.picture_rows(FEATURES, layout, text).asnumpy(), expected)


def test_pictures_and_texts_of_other_sizes_compile_nothing(model):
    """A graph would be compiled while all clients of a server wait."""

    def num_graphs() -> int:
        return sum(len(cell.compile_cache) for _, cell in model.cells_and_names())

    def rows(grid, num_tokens):
        return model.picture_rows(FEATURES, VIEWS.layout(grid), [5] * num_tokens)

    rows((2, 1), 3)
    count = num_graphs()
    assert count > 0
    for grid, num_tokens in (((1, 1), 3), ((2, 1), 64), ((2, 1), 65), ((1, 2), 300), ((2, 1), 0)):
        rows(grid, num_tokens)
    assert num_graphs() == count


def test_texts_are_embedded_in_units(model):
    table = model.embed(Tensor(np.arange(model.config.language_model.vocab_size, dtype=np.int32))).asnumpy()
    for size in (0, 1, 64, 65, 200):
        ids = np.random.default_rng(size).integers(0, len(table), size)
        embeds = model.embed_text(ids.tolist()).asnumpy()
        assert len(embeds) == max(64, -(-size // 64) * 64)
        np.testing.assert_array_equal(embeds[:size], table[ids])


def test_the_separator_takes_the_dtype_of_the_features(model):
    rows = ImageTextModel.picture_rows(model, FEATURES.astype(ms.float16), VIEWS.layout((2, 1)), ())
    assert rows.dtype == ms.float16
