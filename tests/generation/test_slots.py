"""Slots are independent: a request gets the same answer with and without others."""

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindvlm.api import load
from mindvlm.core import runtime
from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError
from mindvlm.generation.engine import Engine
from mindvlm.generation.request import Addition, Request, Slot
from mindvlm.native.library import open_library
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import write_tiny_vary

BOUND = 1e-6
LENGTHS = (70, 5, 33, 64, 12, 130, 3, 41)
OPTIONS = (
    {"repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 0.7},
    {},
    {"do_sample": True, "top_k": 5, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_p": 0.8, "temperature": 1.4, "repetition_penalty": 1.1},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "top_k": 9, "top_p": 0.9},
    {"repetition_penalty": 0.8},
)
NUM_NEW = (9, 4, 7, 2, 12, 6, 3, 8)


def write_vary(folder: Path) -> Path:
    return write_tiny_vary(folder)


MODELS = {"vary": write_vary, "tinyllava": write_tiny_tinyllava}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each family's tiny model, loaded once."""
    return {name: load(write(tmp_path_factory.mktemp(name)), cache=False) for name, write in MODELS.items()}


@pytest.fixture
def make_engine(loaded):
    def make(family: str = "vary", *, mode: str = "pynative", **options) -> Engine:
        model = loaded[family]
        defaults = {"placeholder_id": model.engine.placeholder_id, "max_length": model.engine.max_length}
        return Engine(model.model, **(defaults | options), graph_mode=mode == "graph")

    return make


@pytest.fixture
def counting_engine(make_engine, monkeypatch) -> Engine:
    """An engine that notes which graphs it would compile, and runs them in PyNative mode."""
    monkeypatch.setattr(runtime, "set_mode", lambda graph_mode, set_mode=runtime.set_mode: set_mode(False))
    monkeypatch.setattr(nn.Cell, "compile", lambda cell, *inputs: cell.phase_cache.update({cell.phase: ""}))
    return make_engine(mode="graph")


def random_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def request_of(engine: Engine, number: int, *, length: int | None = None, **options) -> Request:
    """Every other request has a picture in its middle, as long as the number says."""
    rng = np.random.default_rng(number)
    ids, features = random_ids(length or LENGTHS[number], number), None
    if number % 2:
        num_rows = 4 + number
        rows = rng.standard_normal((num_rows, engine.config.hidden_size)).astype(np.float32)
        features = Tensor(0.1 * rows)
        ids[2:2] = [engine.placeholder_id] * num_rows
    rules = GenerationConfig(**{"max_new_tokens": NUM_NEW[number], **OPTIONS[number], **options})
    return Request(ids=ids, features=features, options=rules, seed=number)


def run(
    engine: Engine, requests: list[Request], arrivals: list[int] | None = None
) -> list[tuple[list[int], np.ndarray]]:
    """Ids and logits (steps, V) of each request. Request n is added before step `arrivals[n]`, or when a slot is free
    if that is later; each is released when it ends."""
    arrivals = arrivals or [0] * len(requests)
    slots: dict[Slot, int] = {}
    found: list[tuple[list[int], list]] = [([], []) for _ in requests]
    waiting, time = sorted(range(len(requests)), key=arrivals.__getitem__), 0
    while waiting or slots:
        while waiting and arrivals[waiting[0]] <= time and None in engine.slots:
            number = waiting.pop(0)
            slots[engine.add(requests[number])] = number
        for slot in engine.step():
            ids, logits = found[slots[slot]]
            ids.append(slot.new_ids[-1])
            logits.append(engine.next_logits[slot.row].asnumpy())
            if slot.stop_reason:
                engine.release(slot)
                del slots[slot]
        time += 1
    return [(ids, np.stack(logits)) for ids, logits in found]


def assert_as_alone(alone: Engine, requests: list[Request], found: list[tuple[list[int], np.ndarray]]) -> None:
    for number, (request, (ids, logits)) in enumerate(zip(requests, found, strict=True)):
        ((expected_ids, expected),) = run(alone, [request])
        assert ids == expected_ids, number
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        assert error < BOUND, f"request {number}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("vary", "pynative"),
        ("tinyllava", "pynative"),
        pytest.param("vary", "graph", marks=pytest.mark.ci),
        pytest.param("tinyllava", "graph", marks=pytest.mark.ci),
    ],
)
def test_mixed_requests_get_what_each_gets_alone(make_engine, family, mode):
    """Eight requests go through four slots; some come while others run, some wait for a slot."""
    engine = make_engine(family, mode=mode, num_slots=4)
    requests = [request_of(engine, number) for number in range(8)]
    found = run(engine, requests, arrivals=[0, 0, 1, 3, 3, 4, 8, 8])
    assert [len(ids) for ids, _ in found] == list(NUM_NEW)
    assert_as_alone(make_engine(family, mode=mode), requests, found)


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def test_a_row_beyond_the_ntk_limit_does_not_turn_the_others(make_engine, monkeypatch, mode):
    """One prompt is beyond the limit, one crosses it while it is answered, two stay below."""
    engine, alone = make_engine(mode=mode, num_slots=4), make_engine(mode=mode)
    monkeypatch.setattr(engine.config, "training_length", 32)
    requests = [request_of(engine, number, length=length) for number, length in ((0, 40), (2, 30), (4, 8), (6, 70))]
    found = run(engine, requests, arrivals=[0, 0, 1, 2])
    assert [engine.alpha_for(len(request.ids)) for request in requests] == [3, 1, 1, 7]
    assert_as_alone(alone, requests, found)


def test_alone_in_a_large_engine_is_the_same_to_the_last_bit(make_engine):
    """The same shapes: not even the rounding depends on the neighbours."""
    engine = make_engine(num_slots=4)
    engine.reserve(256)
    requests = [request_of(engine, number) for number in range(4)]
    together = run(engine, requests)
    for number, request in enumerate(requests):
        # into the same row: the kernels may treat the rows of a matrix differently
        engine.resize(4)
        blockers = [engine.add(Request(ids=[1])) for _ in range(number)]
        for slot in blockers:
            slot.stop_reason = "held"
        ((ids, logits),) = run(engine, [request])
        assert ids == together[number][0]
        np.testing.assert_array_equal(logits, together[number][1])


MODES = ["pynative", "graph"]


def steps_of(engine: Engine, slot: Slot, count: int = 3) -> np.ndarray:
    """The logits after the prompt and of the first tokens, (count, V)."""
    found = []
    for _ in range(count):
        engine.step()
        found.append(engine.next_logits[slot.row].asnumpy())
    return np.stack(found)


def exact_engine(make_engine, **options) -> Engine:
    if open_library() is None:
        pytest.skip("there are no kernels")
    engine = make_engine(num_slots=4, **options)
    assert engine.is_exact
    return engine


@pytest.mark.parametrize("mode", MODES)
def test_requests_that_are_added_together_have_the_bits_of_single_ones(make_engine, mode):
    engine, alone = exact_engine(make_engine, mode=mode), exact_engine(make_engine, mode=mode)
    requests = [request_of(engine, number, max_new_tokens=9) for number in (5, 1, 0, 3)]
    # another capacity, and other numbers of blocks in a run
    alone.reserve(320)
    alone.run_sizes = (2, 1)
    slots = engine.add_all([Addition(request) for request in requests])
    found = [[engine.next_logits[slot.row].asnumpy()] for slot in slots]
    for _ in range(3):
        engine.step()
        for slot, logits in zip(slots, found, strict=True):
            logits.append(engine.next_logits[slot.row].asnumpy())
    for request, slot, logits in reversed(list(zip(requests, slots, found, strict=True))):
        single = alone.add(request)
        assert single.row != slot.row or request is requests[0]
        first = alone.next_logits[single.row].asnumpy()
        np.testing.assert_array_equal(np.stack(logits), [first, *steps_of(alone, single)])
        assert single.new_ids == slot.new_ids
        alone.release(single)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_kept", [64, 128])
def test_a_prompt_has_the_same_bits_however_many_of_its_blocks_are_kept(make_engine, mode, num_kept):
    engine = exact_engine(make_engine, mode=mode)
    request = request_of(engine, 5, max_new_tokens=9)
    whole = engine.add(request)
    first = engine.next_logits[whole.row].asnumpy()
    expected = [first, *steps_of(engine, whole)]
    other = Request(ids=[*request.ids[:num_kept], *random_ids(30, 8)], features=request.features)
    blockers, kept = [engine.add(Request(ids=[1])) for _ in range(2)], engine.add(other)
    for slot in (whole, *blockers):
        engine.release(slot)
    slot = engine.add(request, slot=kept, num_kept=num_kept)
    assert slot.row == 3
    np.testing.assert_array_equal(engine.next_logits[slot.row].asnumpy(), first)
    np.testing.assert_array_equal(steps_of(engine, slot), expected[1:])


def test_requests_that_cannot_be_added_together_change_nothing(make_engine):
    engine = make_engine(num_slots=2)
    good = request_of(engine, 1)
    for bad in (Request(ids=[1] * 400), Request(ids=[engine.placeholder_id])):
        with pytest.raises(UserError):
            engine.add_all([Addition(good), Addition(bad)])
    with pytest.raises(UserError, match="all 2 slots are busy"):
        engine.add_all([Addition(good)] * 3)
    assert engine.slots == [None] * 2 and engine.caches is None


def test_no_value_of_an_option_compiles_a_graph(counting_engine):
    engine = counting_engine

    def num_compiled(**options) -> int:
        run(engine, [Request(ids=[1, 2, 3], options=GenerationConfig(max_new_tokens=2, **options))])
        return len(engine.runner.compiled)

    # one graph each for the largest logit, for penalties, for draws among few tokens and among all
    num_compiled()
    num_compiled(repetition_penalty=1.2)
    num_compiled(do_sample=True, top_k=5)
    count = num_compiled(do_sample=True)
    values = [{"temperature": 0.5 + 0.1 * n, "top_k": 3 * n % 7, "top_p": 1 - 0.05 * n} for n in range(12)]
    for n, options in enumerate(values):
        penalties = {"repetition_penalty": 0.6 + 0.1 * n, "no_repeat_ngram_size": n % 5}
        assert num_compiled(do_sample=True, **options, **penalties) == num_compiled(**penalties) == count


def test_a_held_slot_is_continued_where_it_was(make_engine):
    """A finished slot waits while others run, and continues from the ids in its cache."""
    engine, alone = make_engine(num_slots=2), make_engine()
    first = request_of(engine, 1)
    held = engine.add(first)
    while held.stop_reason is None:
        engine.step()
    run(engine, [request_of(engine, 0), request_of(engine, 2)])
    ids = [*first.ids, *held.new_ids, *random_ids(9, 7)]
    prefilled, run_prefill = [], engine.run_prefill
    engine.run_prefill = lambda prompts, features: (
        prefilled.extend(prompt.ids for prompt in prompts) or run_prefill(prompts, features)
    )
    request = Request(ids=ids, features=first.features, options=GenerationConfig(max_new_tokens=3))
    slot = engine.add(request, slot=held)
    assert prefilled == [ids[len(first.ids) + NUM_NEW[1] - 1 :]] and slot.row == held.row and held.is_released
    engine.step()
    ((_, expected),) = run(alone, [request])
    error = np.linalg.norm(engine.next_logits[slot.row].asnumpy() - expected[0]) / np.linalg.norm(expected[0])
    assert error < BOUND


def test_a_full_slot_that_waits_keeps_what_it_holds(make_engine):
    engine = make_engine(num_slots=2, max_length=128)
    full = Request(ids=random_ids(128, 1), options=GenerationConfig(max_new_tokens=1))
    held = engine.add(full)
    engine.step()
    run(engine, [request_of(engine, 0)])
    request = Request(ids=[*full.ids[:127], 9], options=GenerationConfig(max_new_tokens=1))
    slot = engine.add(request, slot=held)
    engine.step()
    ((_, expected),) = run(make_engine(max_length=128), [request])
    error = np.linalg.norm(engine.next_logits[slot.row].asnumpy() - expected[0]) / np.linalg.norm(expected[0])
    assert error < BOUND


def test_requests_without_text(make_engine):
    """Ids in, ids out: a stop rule sees ids only."""
    engine = make_engine(num_slots=2)
    free = engine.complete([request_of(engine, 2), request_of(engine, 4), request_of(engine, 6)])
    assert [len(slot.new_ids) for slot in free] == [NUM_NEW[2], NUM_NEW[4], NUM_NEW[6]]
    assert {slot.stop_reason for slot in free} == {"max_new_tokens"} and engine.slots == [None, None]
    ends = free[0].new_ids[2]
    request = request_of(engine, 2)
    request.stop = lambda token: "end of page" if token == ends else None
    (slot,) = engine.complete([request])
    count = free[0].new_ids.index(ends) + 1
    assert (slot.new_ids, slot.stop_reason) == (free[0].new_ids[:count], "end of page")


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_only_the_request_with_nan_fails(make_engine, mode):
    engine, alone = make_engine(num_slots=2, mode=mode), make_engine()
    # the next request in the row of the failed one is shorter, and later ones attend to the rest of the row
    requests = [request_of(engine, number) for number in (0, 5, 6, 4)]
    features = requests[1].features.asnumpy()
    features[0, 0] = np.nan
    requests[1].features = Tensor(features)
    slots = engine.complete(requests)
    assert [slot.stop_reason for slot in slots] == ["max_new_tokens", "error", *["max_new_tokens"] * 2]
    message = "the logits of token 1 of the answer contain NaN or infinity in float32: the weights are damaged"
    assert str(slots[1].error).startswith(message) and slots[1].new_ids == [] and slots[2].row == slots[1].row
    for request, slot in zip(requests, slots, strict=True):
        if slot.error is None:
            assert slot.new_ids == alone.complete([request])[0].new_ids


def test_busy_slots_are_said(make_engine):
    engine = make_engine()
    slot = engine.add(request_of(engine, 0))
    with pytest.raises(UserError, match="all 1 slots are busy"):
        engine.add(request_of(engine, 2))
    engine.release(slot)
    engine.release(slot)
    assert engine.add(request_of(engine, 2)).row == 0 and engine.step()[0].new_ids


def test_an_interrupted_batch_frees_its_slots(make_engine, monkeypatch):
    engine = make_engine(num_slots=2)
    requests = [request_of(engine, number) for number in range(3)]

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.complete(requests)
    assert engine.slots == [None, None]
    assert all(slot.stop_reason for slot in engine.complete(requests))


def test_resizing_forgets_the_graphs_of_the_old_cache(counting_engine):
    engine = counting_engine
    request = request_of(engine, 2, length=5)
    counts = []
    for num_slots in (1, 2, 1, 2):
        engine.resize(num_slots)
        engine.complete([request])
        counts.append(len(engine.runner.compiled))
    # the sampler keeps a graph for each number of slots
    assert counts[1] == counts[2] == counts[3]
