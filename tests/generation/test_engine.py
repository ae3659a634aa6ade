"""The cache against one pass without it, for every way in which tokens get into it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.generation import engine as engine_module
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Generator
from mindvlm.generation.graphs import bucket_length, cache_capacity
from mindvlm.generation.stopping import RowStop
from mindvlm.nn.rotary import inverse_frequencies, ntk_alpha
from tests.tiny_vary import IMAGE_TOKEN_LEN, VOCAB_SIZE, tiny_model

PAD = VOCAB_SIZE - 1
BOUND = 1e-5


@pytest.fixture(scope="module")
def shared():
    return tiny_model()


@pytest.fixture
def make_engine(shared):
    def make(**options) -> Engine:
        return Engine(shared.model, **({"placeholder_id": PAD, "max_length": 320, "graph_mode": False} | options))

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE - 6, length).tolist()


def uncached(engine: Engine, ids: list[int], features=None) -> np.ndarray:
    return engine.logits(np.array([ids], np.int32), features)[0].asnumpy()


def assert_close(actual, expected):
    actual = actual.asnumpy() if isinstance(actual, Tensor) else actual
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < BOUND, f"relative error {error:.2e}"


def tokens(*ids: int) -> Tensor:
    return Tensor(np.array(ids, np.int32))


@pytest.mark.parametrize("graph_mode", [False, True])
def test_cached_decoding_equals_one_pass(make_engine, shared, graph_mode):
    engine = shared.engine if graph_mode else make_engine()
    ids = random_ids(12)
    expected = uncached(make_engine(), ids)
    engine.reset(1)
    assert_close(engine.append([ids[:9]])[0], expected[8])
    for i in range(9, 12):
        assert_close(engine.step(tokens(ids[i]))[0], expected[i])
    assert engine.lengths.tolist() == [12]


def test_pictures_in_the_prompt(engine):
    features = Tensor(np.random.default_rng(1).standard_normal((2, IMAGE_TOKEN_LEN, 32)).astype(np.float32))
    span = [PAD] * IMAGE_TOKEN_LEN
    ids = [*random_ids(3), *span, *random_ids(2), *span, *random_ids(4)]
    expected = uncached(engine, ids, features)
    engine.reset(1)
    assert_close(engine.append([ids], features)[0], expected[-1])
    swapped = Tensor(features.asnumpy()[::-1].copy())
    assert np.abs(uncached(engine, ids, swapped)[-1] - expected[-1]).max() > 1e-3


def test_rows_of_different_lengths_equal_single_rows(engine):
    features = Tensor(np.random.default_rng(1).standard_normal((1, IMAGE_TOKEN_LEN, 32)).astype(np.float32))
    rows = [random_ids(3), [*random_ids(2), *[PAD] * IMAGE_TOKEN_LEN, *random_ids(70, 5)], random_ids(20, 7)]
    following = [11, 12, 13]
    expected = [uncached(engine, row + [token], features if i == 1 else None) for i, (row, token) in
                enumerate(zip(rows, following, strict=True))]  # fmt: skip
    engine.reset(3)
    logits = engine.append(rows, features)
    for i, row in enumerate(rows):
        assert_close(logits[i], expected[i][len(row) - 1])
    logits = engine.step(tokens(*following))
    for i in range(3):
        assert_close(logits[i], expected[i][-1])


@pytest.mark.parametrize("lengths", [(150, 20), (64, 128)])
def test_prefill_in_pieces_equals_one_piece(engine, monkeypatch, lengths):
    rows = [random_ids(length, seed=length) for length in lengths]
    expected = [uncached(engine, row + [7]) for row in rows]
    monkeypatch.setattr(engine_module, "MAX_PREFILL_LENGTH", 64)
    engine.reset(len(rows))
    calls = []
    run = engine.run
    engine.run = lambda stage, graph, *inputs: calls.append(graph) or run(stage, graph, *inputs)
    logits = engine.append(rows)
    assert calls.count(engine.prefill) == -(-max(lengths) // 64)
    stepped = engine.step(tokens(*[7] * len(rows)))
    for i, row in enumerate(rows):
        assert_close(logits[i], expected[i][len(row) - 1])
        assert_close(stepped[i], expected[i][-1])


def test_appending_later_equals_one_pass(engine):
    ids = random_ids(100)
    expected = uncached(engine, ids)
    engine.reset(1)
    engine.append([ids[:40]])
    engine.step(tokens(ids[40]))
    assert_close(engine.append([ids[41:]])[0], expected[-1])


def test_a_growing_cache_keeps_what_is_in_it(engine):
    ids = random_ids(135)
    expected = uncached(engine, ids)
    engine.reset(1)
    engine.append([ids[:126]])
    assert engine.num_slots == 128
    for i in range(126, 130):
        logits = engine.step(tokens(ids[i]))
        assert_close(logits[0], expected[i])
    assert engine.num_slots == 256


def test_a_used_cache_does_not_shine_through(engine):
    engine.reset(1)
    engine.append([random_ids(100, seed=3)])
    ids = random_ids(5)
    engine.reset(1)
    assert_close(engine.append([ids])[0], uncached(engine, ids)[-1])


def test_truncated_rows_go_on_from_there(engine):
    ids = random_ids(12)
    engine.reset(1)
    engine.append([ids[:8] + [1, 2, 3]])
    engine.truncate(8)
    assert_close(engine.append([ids[8:]])[0], uncached(engine, ids)[-1])


def test_a_prompt_that_is_too_long_changes_nothing(make_engine):
    engine = make_engine(max_length=20)
    ids = random_ids(20)
    engine.reset(1)
    engine.append([ids[:10]])
    with pytest.raises(UserError, match="the prompt has 21 tokens but the context holds 20"):
        engine.append([random_ids(11, seed=9)])
    assert engine.lengths.tolist() == [10]
    assert_close(engine.append([ids[10:]])[0], uncached(engine, ids)[-1])
    with pytest.raises(UserError, match="has 21 tokens"):
        engine.logits(np.zeros((1, 21), np.int32))


@pytest.mark.parametrize("num_features", [0, 2])
def test_placeholders_and_features_must_agree(engine, num_features):
    features = Tensor(np.zeros((num_features, IMAGE_TOKEN_LEN, 32), np.float32)) if num_features else None
    expected = f"8 image placeholders but the images give {num_features * 8} feature rows"
    engine.reset(1)
    with pytest.raises(UserError, match=expected):
        engine.append([[1, *[PAD] * IMAGE_TOKEN_LEN]], features)


def test_ntk_factor_of_the_published_lengths():
    assert [ntk_alpha(length, 8192) for length in (1, 8192, 8193, 16384, 16385, 32767)] == [1, 1, 3, 3, 7, 7]
    bases = [10000 * alpha ** (128 / 126) for alpha in (3, 7)]
    np.testing.assert_allclose(bases, [30527.74, 72195.86], rtol=1e-6)
    for alpha, base in zip((3, 7), bases, strict=True):
        frequencies = inverse_frequencies(128, 10000.0, alpha=alpha)
        np.testing.assert_allclose(frequencies, base ** (-np.arange(0, 128, 2) / 128), rtol=2e-6)


def test_ntk_factor_follows_the_prompt_and_stays(make_engine, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine.config, "training_length", 16)
    for length, alpha in ((16, 1), (17, 3), (33, 7)):
        engine.reset(1)
        engine.append([random_ids(length)])
        assert engine.alpha == alpha
        np.testing.assert_array_equal(engine.inv_freq.asnumpy(), inverse_frequencies(16, 10000.0, alpha=alpha))
    engine.reset(1)
    engine.append([random_ids(16)])
    for token in range(3):
        engine.step(tokens(token))
    engine.append([random_ids(5)])
    assert engine.alpha == 1 and engine.lengths.tolist() == [24]


def test_beyond_the_training_length_cached_equals_one_pass(make_engine, monkeypatch):
    engine = make_engine()
    plain = uncached(engine, random_ids(24))
    monkeypatch.setattr(engine.config, "training_length", 16)
    # one length so that both sides see the same NTK factor; LogN acts from slot 16 on
    ids = random_ids(24)
    engine.reset(1)
    engine.append([ids[:20]])
    for i in range(20, 24):
        logits = engine.step(tokens(ids[i]))
    fresh = make_engine()
    expected = uncached(fresh, ids)
    assert fresh.alpha_for(20) == fresh.alpha_for(24) == 3
    assert_close(logits[0], expected[-1])
    assert np.abs(expected[-1] - plain[-1]).max() > 1e-3


def test_modes_do_not_leak_between_models(make_engine, shared):
    ids = random_ids(12)
    pynative = make_engine()
    for engine, mode in ((pynative, ms.PYNATIVE_MODE), (shared.engine, ms.GRAPH_MODE)) * 2:
        engine.reset(1)
        engine.append([ids[:9]])
        assert ms.get_context("mode") == mode


def test_buckets_and_capacities():
    assert [bucket_length(length) for length in (1, 64, 65, 292)] == [64, 64, 128, 320]
    assert [cache_capacity(length, 2048) for length in (1, 129, 1025, 2048)] == [128, 256, 2048, 2048]
    assert cache_capacity(300, 320) == 320
    assert cache_capacity(400, 320) == 400


def test_a_row_that_ended_does_not_outgrow_the_context(make_engine):
    """One row stops near the limit while the other goes on: the cache stays at its size."""
    engine = make_engine(max_length=30)
    rows = [random_ids(28), random_ids(4, seed=2)]
    engine.reset(2)
    logits = engine.append(rows)
    slots = engine.num_slots
    stops = [RowStop(range(VOCAB_SIZE), (), Silent()), RowStop((), (), Silent())]
    *_, answers = Generator(engine).stream(rows, logits, GenerationConfig(max_new_tokens=9), stops=stops, seed=0)
    assert [row.stop_reason for row in answers] == ["stop_token", "max_new_tokens"]
    assert engine.lengths.max() <= 30 and engine.num_slots == slots
    expected = uncached(engine, rows[1] + answers[1].ids[:-1])
    assert answers[1].ids == expected[len(rows[1]) - 1 :].argmax(-1).tolist()


def test_a_full_context_ends_the_answer(make_engine):
    engine = make_engine(max_length=10)
    rows = [random_ids(8)]
    engine.reset(1)
    logits = engine.append(rows)
    stops = [RowStop((), (), Silent())]
    *_, answers = Generator(engine).stream(rows, logits, GenerationConfig(), stops=stops, seed=0)
    assert answers[0].stop_reason == "context_full" and len(answers[0].ids) == 3


def test_a_stream_notices_that_the_cache_went_to_somebody_else(engine):
    rows = [random_ids(8)]
    engine.reset(1)
    logits = engine.append(rows)
    stream = Generator(engine).stream(rows, logits, GenerationConfig(), stops=[RowStop((), (), Silent())], seed=0)
    next(stream)
    engine.reset(1)
    engine.append([random_ids(3)])
    with pytest.raises(UserError, match="asked something else"):
        next(stream)


class Silent:
    """A decoder for tests that look at ids only."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
