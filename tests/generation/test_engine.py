"""The cache against one pass without it, for every way in which tokens get into it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.generation import prefill
from mindvlm.generation.engine import Engine
from mindvlm.generation.graphs import UNCHECKED_PHASE, Graph, GraphRunner, bucket_length, cache_capacity
from mindvlm.generation.request import Request, Slot
from mindvlm.nn.rotary import inverse_frequencies, ntk_alpha
from tests.tiny_vary import IMAGE_TOKEN_LEN, VOCAB_SIZE, tiny_model

PAD = VOCAB_SIZE - 1
BOUND = 1e-5


@pytest.fixture(scope="module")
def shared():
    return tiny_model("graph")


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


def ask(engine: Engine, ids: list[int], features=None, *, answer: tuple[int, ...] = (0,), slot=None) -> Slot:
    """A slot that is given these tokens as its answer."""
    options = GenerationConfig(max_new_tokens=len(answer))
    return engine.add(Request(ids=ids, features=features, options=options, forced_ids=answer), slot=slot)


def follow(engine: Engine, slot: Slot) -> list[np.ndarray]:
    """The logits before each token of the answer."""
    found = []
    while slot.stop_reason is None:
        engine.step()
        found.append(engine.next_logits[slot.row].asnumpy())
    return found


@pytest.mark.parametrize("graph_mode", [False, True])
def test_cached_decoding_equals_one_pass(make_engine, shared, graph_mode):
    engine = shared.engine if graph_mode else make_engine()
    ids = random_ids(12)
    expected = uncached(make_engine(), ids)
    engine.resize(1)
    slot = ask(engine, ids[:9], answer=(*ids[9:], 0))
    for i, logits in enumerate(follow(engine, slot)):
        assert_close(logits, expected[8 + i])
    assert slot.cached == ids and slot.new_ids == [*ids[9:], 0]


def test_pictures_in_the_prompt(engine):
    features = Tensor(np.random.default_rng(1).standard_normal((2, IMAGE_TOKEN_LEN, 32)).astype(np.float32))
    span = [PAD] * IMAGE_TOKEN_LEN
    ids = [*random_ids(3), *span, *random_ids(2), *span, *random_ids(4)]
    expected = uncached(engine, ids, features)
    ask(engine, ids, features)
    assert_close(engine.next_logits[0], expected[-1])
    swapped = Tensor(features.asnumpy()[::-1].copy())
    assert np.abs(uncached(engine, ids, swapped)[-1] - expected[-1]).max() > 1e-3


def test_rows_of_different_lengths_equal_single_rows(make_engine):
    engine = make_engine(num_slots=3)
    features = Tensor(np.random.default_rng(1).standard_normal((1, IMAGE_TOKEN_LEN, 32)).astype(np.float32))
    rows = [random_ids(3), [*random_ids(2), *[PAD] * IMAGE_TOKEN_LEN, *random_ids(70, 5)], random_ids(20, 7)]
    of_rows = [None, features, None]
    following = [11, 12, 13]
    expected = [uncached(engine, [*row, token], f) for row, token, f in zip(rows, following, of_rows, strict=True)]
    for row, token, f in zip(rows, following, of_rows, strict=True):
        ask(engine, row, f, answer=(token, 0))
    for i, row in enumerate(rows):
        assert_close(engine.next_logits[i], expected[i][len(row) - 1])
    engine.step()
    engine.step()
    for i in range(3):
        assert_close(engine.next_logits[i], expected[i][-1])


@pytest.mark.parametrize("length", [150, 64, 128])
@pytest.mark.parametrize("packs", [False, True])
def test_prefill_in_pieces_equals_one_piece(engine, monkeypatch, length, packs):
    features = Tensor(np.random.default_rng(1).standard_normal((4, IMAGE_TOKEN_LEN, 32)).astype(np.float32))
    span = [PAD] * IMAGE_TOKEN_LEN
    # a picture across the border of two pieces
    ids = [*span, *random_ids(length - 4 * len(span) - 2, seed=length), *span, *span, *span, 1, 2]
    expected = uncached(engine, [*ids, 7], features)
    monkeypatch.setattr(prefill, "MAX_PREFILL_LENGTH", 64)
    engine.run_sizes, engine.is_exact = (1,), engine.is_exact and packs
    calls = []
    run = engine.runner.run
    engine.runner.run = lambda stage, graph, *inputs: calls.append(graph) or run(stage, graph, *inputs)
    slot = ask(engine, ids, features, answer=(7, 0))
    assert calls.count(engine.prefill) == -(-length // 64)
    for i, logits in enumerate(follow(engine, slot)):
        assert_close(logits, expected[length - 1 + i])


def test_prompts_do_without_operators_that_keep_memory(engine, monkeypatch):
    """Each call of ops.zeros and ops.concat outside of a graph takes memory that MindSpore does not free."""
    features = Tensor(np.ones((2, engine.config.hidden_size), np.float32))
    ids = [*random_ids(5), PAD, PAD, *random_ids(3)]
    engine.release(ask(engine, ids, features))
    monkeypatch.setattr("mindvlm.nn.rows.ops", None)
    engine.release(ask(engine, ids, features))
    engine.release(ask(engine, random_ids(70)))


def test_continuing_later_equals_one_pass(engine):
    ids = random_ids(100)
    expected = uncached(engine, ids)
    slot = ask(engine, ids[:40], answer=(ids[40], 0))
    follow(engine, slot)
    slot = ask(engine, ids, slot=slot)
    assert_close(engine.next_logits[0], expected[-1])


def test_a_growing_cache_keeps_what_is_in_it(engine):
    ids = random_ids(135)
    expected = uncached(engine, ids)
    slot = ask(engine, ids[:126], answer=(*ids[126:130], 0))
    assert engine.capacity == 128
    for i, logits in enumerate(follow(engine, slot)):
        assert_close(logits, expected[125 + i])
    assert engine.capacity == 256


def test_a_used_cache_does_not_shine_through(engine):
    engine.release(ask(engine, random_ids(100, seed=3)))
    ids = random_ids(5)
    ask(engine, ids)
    assert_close(engine.next_logits[0], uncached(engine, ids)[-1])


def test_a_row_goes_on_from_what_both_prompts_have_in_common(engine):
    ids = random_ids(12)
    slot = ask(engine, ids[:8] + [1, 2, 3])
    follow(engine, slot)
    starts, run_prefill = [], engine.run_prefill
    engine.run_prefill = lambda prompts, features: starts.append(prompts[0].start) or run_prefill(prompts, features)
    slot = ask(engine, ids, slot=slot)
    assert_close(engine.next_logits[0], uncached(engine, ids)[-1])
    follow(engine, slot)
    # the whole prompt is there; its last token is computed again for its logits
    ask(engine, ids[:10], slot=slot)
    assert_close(engine.next_logits[0], uncached(engine, ids[:10])[-1])
    assert starts == [8, 9]


def test_a_prompt_that_is_too_long_changes_nothing(make_engine):
    engine = make_engine(max_length=20)
    ids = random_ids(20)
    slot = ask(engine, ids[:10])
    follow(engine, slot)
    with pytest.raises(UserError, match="the prompt has 21 tokens but the context holds 20"):
        ask(engine, ids[:10] + random_ids(11, seed=9), slot=slot)
    assert slot.cached == ids[:10] and not slot.is_released
    ask(engine, ids, slot=slot)
    assert_close(engine.next_logits[0], uncached(engine, ids)[-1])
    with pytest.raises(UserError, match="has 21 tokens"):
        engine.logits(np.zeros((1, 21), np.int32))


@pytest.mark.parametrize("num_features", [0, 2])
def test_placeholders_and_features_must_agree(engine, num_features):
    features = Tensor(np.zeros((num_features, IMAGE_TOKEN_LEN, 32), np.float32)) if num_features else None
    expected = f"8 image placeholders but the images give {num_features * 8} feature rows"
    with pytest.raises(UserError, match=expected):
        ask(engine, [1, *[PAD] * IMAGE_TOKEN_LEN], features)
    assert engine.slots == [None]


def test_a_continued_prompt_brings_the_features_of_all_its_pictures(engine):
    features = Tensor(np.random.default_rng(1).standard_normal((2, IMAGE_TOKEN_LEN, 32)).astype(np.float32))
    span = [PAD] * IMAGE_TOKEN_LEN
    ids = [*random_ids(3), *span, *random_ids(2), *span, *random_ids(4)]
    slot = ask(engine, ids[:13], features[:1])
    follow(engine, slot)
    with pytest.raises(UserError, match="8 image placeholders but the images give 0 feature rows"):
        ask(engine, ids, slot=slot)
    ask(engine, ids, features, slot=slot)
    assert_close(engine.next_logits[0], uncached(engine, ids, features)[-1])


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
        slot = ask(engine, random_ids(length), answer=(1, 2, 3, 0))
        assert slot.alpha == alpha
        np.testing.assert_array_equal(engine.inv_freq[0], inverse_frequencies(16, 10000.0, alpha=alpha))
        follow(engine, slot)
        assert len(slot.cached) == length + 3 and slot.alpha == alpha
        engine.release(slot)


def test_another_ntk_factor_computes_the_keys_again(make_engine, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine.config, "training_length", 16)
    ids = random_ids(24)
    slot = ask(engine, ids[:16], answer=(ids[16], ids[17], 0))
    follow(engine, slot)
    slot = ask(engine, ids, slot=slot)
    assert slot.alpha == 3
    assert_close(engine.next_logits[0], uncached(engine, ids)[-1])


def test_beyond_the_training_length_cached_equals_one_pass(make_engine, monkeypatch):
    engine = make_engine()
    plain = uncached(engine, random_ids(24))
    monkeypatch.setattr(engine.config, "training_length", 16)
    # one length so that both sides see the same NTK factor; LogN acts from position 16 on
    ids = random_ids(24)
    *_, logits = follow(engine, ask(engine, ids[:20], answer=(*ids[20:], 0)))
    fresh = make_engine()
    expected = uncached(fresh, ids)
    assert fresh.alpha_for(20) == fresh.alpha_for(24) == 3
    assert_close(logits, expected[-1])
    assert np.abs(expected[-1] - plain[-1]).max() > 1e-3


def test_modes_do_not_leak_between_models(make_engine, shared):
    ids = random_ids(12)
    pynative = make_engine()
    for engine, mode in ((pynative, ms.PYNATIVE_MODE), (shared.engine, ms.GRAPH_MODE)) * 2:
        engine.resize(1)
        ask(engine, ids[:9])
        assert ms.get_context("mode") == mode


def test_buckets_and_capacities():
    assert [bucket_length(length) for length in (1, 64, 65, 292)] == [64, 64, 128, 320]
    assert [cache_capacity(length, 2048) for length in (1, 129, 1025, 2048)] == [128, 256, 2048, 2048]
    assert cache_capacity(300, 320) == 320
    assert cache_capacity(400, 320) == 400


def test_a_row_that_ended_does_not_outgrow_the_context(make_engine):
    """One row stops near the limit while the other continues: the cache keeps its size."""
    engine = make_engine(max_length=30, num_slots=2)
    rows = [random_ids(28), random_ids(4, seed=2)]
    options = GenerationConfig(max_new_tokens=9)
    first = engine.add(Request(ids=rows[0], options=options, stop=lambda token: "stop_token"))
    second = engine.add(Request(ids=rows[1], options=options))
    capacity = engine.capacity
    while engine.step():
        pass
    assert [slot.stop_reason for slot in (first, second)] == ["stop_token", "max_new_tokens"]
    assert max(len(slot.cached) for slot in (first, second)) <= 30 and engine.capacity == capacity
    expected = uncached(engine, rows[1] + second.new_ids[:-1])
    assert second.new_ids == expected[len(rows[1]) - 1 :].argmax(-1).tolist()


def test_a_full_context_ends_the_answer(make_engine):
    engine = make_engine(max_length=10)
    (slot,) = engine.complete([Request(ids=random_ids(8))])
    assert slot.stop_reason == "context_full" and len(slot.new_ids) == 3


def test_a_released_slot_gets_no_more_tokens(make_engine):
    engine = make_engine(num_slots=2)
    gone, other = ask(engine, random_ids(8), answer=(1, 2, 3)), ask(engine, random_ids(4), answer=(1, 2, 3))
    engine.step()
    engine.release(gone)
    assert engine.step() == [other] and gone.new_ids == [1] and gone.stop_reason is None


def test_a_graph_writes_its_phase_to_its_cells_only_before_it_is_compiled():
    graph, cell = Graph(), nn.Dense(1, 1)
    graph.cell = cell
    found = []
    for phase in ("first", "first", "second", "first"):
        cell.compile_phase = "of another graph"
        graph.compile_phase = phase
        graph.compile_cache.add(phase)
        found.append(cell.compile_phase)
    assert found == ["first", "of another graph", "second", "of another graph"]


class Added(Graph):
    """x + y with y broadcast to the shape of x."""

    def construct(self, x, y):
        return x + y


def test_each_shape_runs_the_form_that_was_compiled_for_it():
    runner, graph = GraphRunner(graph_mode=True), Added()
    shapes = [(2, 3), (4, 1), (2, 3), (4, 1), (2, 3)]
    for shape in shapes:
        x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        found = runner.run("decode", graph, Tensor(x), Tensor(x[:1]))
        np.testing.assert_array_equal(found.asnumpy(), x + x[:1])
    assert len(runner.compiled) == 2 and graph.phase == UNCHECKED_PHASE
