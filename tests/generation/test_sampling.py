"""The sampler against the rules of transformers, and its draws against the distribution."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.request import Request, Slot
from mindvlm.generation.sampling import (
    FEW_CANDIDATES,
    NOT_FINITE,
    GreedyGraph,
    Sampler,
    SamplingGraph,
    greedy_ids,
    repeating_ids,
)

pytestmark = pytest.mark.usefixtures("pynative")

VOCAB_SIZE, NUM_SLOTS = 23, 16
ROWS = [[3, 4, 5, 3, 4], [7, 7, 7, 7, 7, 7], [1, 2, 1, 3, 1, 2, 0, 1], [22]]


def random_logits(num_rows: int = len(ROWS), seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((num_rows, VOCAB_SIZE))).astype(np.float32)


def slots_of(rows=ROWS, **options) -> list[Slot]:
    """A slot for each row, with the same options."""
    rules = GenerationConfig(**options)
    return [Slot(number, Request(ids=row, options=rules), 1) for number, row in enumerate(rows)]


def make_sampler() -> Sampler:
    return Sampler(lambda stage, graph, *inputs: graph(*inputs), vocab_size=VOCAB_SIZE, max_ids=NUM_SLOTS)


class Fixed:
    """A random generator that gives one number."""

    def __init__(self, value: float):
        self.value = value

    def random(self) -> float:
        return self.value


def choose(logits: np.ndarray, slots: list[Slot], uniform=None) -> np.ndarray:
    """Next ids, with these numbers for the draws."""
    for slot, value in zip(slots, uniform if uniform is not None else [0.0] * len(slots), strict=True):
        slot.random = Fixed(value)
    return make_sampler().choose(Tensor(logits), slots)


def penalised(logits: np.ndarray, rows, penalty: float) -> np.ndarray:
    """Returns logits after the repetition penalty."""
    slots = slots_of(rows, repetition_penalty=penalty)
    seen, _, penalties, *_ = make_sampler().rules(slots, len(rows))
    return SamplingGraph(0).penalised(Tensor(logits), seen, penalties).asnumpy()


def expected_rows(processor, logits: np.ndarray, rows=ROWS) -> np.ndarray:
    """transformers knows no rows of different length: each alone."""
    return np.stack(
        [processor(torch.tensor([row]), torch.from_numpy(line[None].copy()))[0].numpy() for row, line in
         zip(rows, logits, strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_repetition_penalty(penalty):
    logits = random_logits()
    actual = penalised(logits, ROWS, penalty)
    np.testing.assert_allclose(actual, expected_rows(RepetitionPenaltyLogitsProcessor(penalty), logits), rtol=1e-6)


def test_padding_is_never_penalised():
    # every token of a short row's padding would otherwise be id 0 (or the end token)
    logits = np.full((2, VOCAB_SIZE), 2.0, np.float32)
    actual = penalised(logits, [[5, -200], [1, 2, 3, 4, 6]], 2.0)
    assert np.flatnonzero(actual[0] != 2.0).tolist() == [5]
    assert np.flatnonzero(actual[1] != 2.0).tolist() == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_no_repeated_ngram(size):
    logits = random_logits()
    expected = np.isneginf(expected_rows(NoRepeatNGramLogitsProcessor(size), logits))
    assert expected.any() == (size < 7)
    found = np.zeros_like(expected)
    for row, ids in enumerate(ROWS):
        found[row, repeating_ids(np.array(ids, np.int32), size)] = True
    np.testing.assert_array_equal(found, expected)
    # whatever is banned is not chosen, and nothing else changes
    best = np.where(expected, -np.inf, logits).argmax(-1)
    np.testing.assert_array_equal(choose(logits, slots_of(no_repeat_ngram_size=size)), best)


def test_generated_tokens_count_as_repetition():
    logits, slots = random_logits(2), slots_of([[1], [2]], no_repeat_ngram_size=1)
    seen = [{1}, {2}]
    for _ in range(1, 10):
        ids = choose(logits, slots)
        for row, slot in enumerate(slots):
            allowed = [token for token in np.argsort(-logits[row]) if token not in seen[row]]
            assert ids[row] == allowed[0]
            seen[row].add(int(ids[row]))
            slot.take(int(ids[row]), 99)


def drawn_shares(logits: np.ndarray, num_draws: int, **options) -> np.ndarray:
    """Share of each token over evenly spread uniform numbers: the exact distribution up to 1 / num_draws."""
    rows = [[0]] * num_draws
    uniform = (np.arange(num_draws) + 0.5) / num_draws
    ids = choose(np.repeat(logits, num_draws, 0), slots_of(rows, do_sample=True, **options), uniform)
    return np.bincount(ids, minlength=VOCAB_SIZE) / num_draws


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5, "top_k": 7},
        {"top_k": 1},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"top_p": 0.01},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
    ],
)
def test_draws_follow_the_warped_distribution(options):
    logits = random_logits(1, seed=4)
    scores = torch.from_numpy(logits.copy())
    if "temperature" in options:
        scores = TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    num_draws = 4000
    shares = drawn_shares(logits, num_draws, **options)
    assert not shares[expected == 0].any()
    assert shares[expected > 2 / num_draws].all()
    np.testing.assert_allclose(shares, expected, atol=2 / num_draws)


def test_random_draws_pass_a_chi_square_test():
    logits = random_logits(1, seed=8, scale=1.0)
    expected = np.exp(logits[0] - logits.max())
    expected /= expected.sum()
    num_draws = 5000
    rows = [[0]] * num_draws
    uniform = np.random.default_rng(1).random(num_draws)
    ids = choose(np.repeat(logits, num_draws, 0), slots_of(rows, do_sample=True), uniform)
    observed = np.bincount(ids, minlength=VOCAB_SIZE)
    statistic = ((observed - num_draws * expected) ** 2 / (num_draws * expected)).sum()
    # 22 degrees of freedom: 48.3 is passed once in a thousand times
    assert statistic < 48.3


def test_the_largest_uniform_number_stays_among_the_kept():
    logits = np.zeros((1, VOCAB_SIZE), np.float32)
    logits[0, :3] = 20
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    # a double so near to 1 that it becomes 1 in float32
    for uniform in (almost_one, np.nextafter(1.0, 0.0)):
        for options in ({"top_k": 3}, {"top_p": 0.9}):
            assert choose(logits, slots_of([[0]], do_sample=True, **options), [uniform])[0] < 3


def test_greedy_takes_the_largest_and_draws_nothing():
    logits = random_logits()
    for value in (0.0, 0.99):
        ids = choose(logits, slots_of(temperature=9.0, top_k=5), [value] * len(ROWS))
        np.testing.assert_array_equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2}, {"do_sample": True}])
def test_logits_that_are_not_finite_give_no_id(value, options):
    logits = random_logits()
    expected = choose(logits, slots_of(**options))
    logits[1, 5] = value
    ids = choose(logits, slots_of(**options))
    assert ids[1] == NOT_FINITE and (np.delete(ids, 1) == np.delete(expected, 1)).all()


def test_the_host_chooses_what_the_graph_chooses():
    logits = random_logits(6)
    logits[0, [3, 9]] = 7
    logits[[1, 2, 3], [5, 6, 7]] = np.nan, np.inf, -np.inf
    expected = GreedyGraph()(Tensor(logits)).asnumpy()
    assert expected[0] == 3 and (expected[1:4] == NOT_FINITE).all()
    np.testing.assert_array_equal(greedy_ids(Tensor(logits)), expected)
    # their sum exceeds float16
    many = Tensor(np.full((1, 32000), 5.0, np.float16))
    np.testing.assert_array_equal(greedy_ids(many), GreedyGraph()(many).asnumpy())


def test_rows_with_rules_of_their_own():
    """One row draws among few, one among all, one is greedy, one has a penalty: each as it does alone."""
    logits, uniform = random_logits(), [0.7, 0.4, 0.9, 0.2]
    options = (
        {"do_sample": True, "top_k": 3},
        {"do_sample": True, "temperature": 1.9},
        {},
        {"repetition_penalty": 9.0},
    )
    together = [
        Slot(n, Request(ids=row, options=GenerationConfig(**one)), 1)
        for n, (row, one) in enumerate(zip(ROWS, options, strict=True))
    ]
    ids = choose(logits, together, uniform)
    for row, one in enumerate(options):
        (alone,) = slots_of([ROWS[row]], **one)
        assert choose(logits[row : row + 1], [alone], [uniform[row]])[0] == ids[row]
    assert ids[2] == logits[2].argmax()


def test_a_draw_does_not_depend_on_how_many_candidates_the_graph_has():
    vocab_size, num_draws = 5 * FEW_CANDIDATES, 400
    logits = np.random.default_rng(3).standard_normal((1, vocab_size)).astype(np.float32).repeat(num_draws, 0)
    inputs = [np.full((num_draws, NUM_SLOTS), vocab_size, np.int32)] * 2
    inputs += [np.ones((num_draws, 1), np.float32), np.ones(num_draws, np.bool_)]
    inputs += [np.full((num_draws, 1), 1.3, np.float32), np.full((num_draws, 1), 50, np.int32)]
    inputs += [np.full((num_draws, 1), 0.95, np.float32), np.linspace(0, 1, num_draws, dtype=np.float32)[:, None]]
    few, all_of_them = (
        SamplingGraph(count)(Tensor(logits), *map(Tensor, inputs)).asnumpy() for count in (FEW_CANDIDATES, vocab_size)
    )
    np.testing.assert_array_equal(few, all_of_them)
    assert len(np.unique(few)) > 20


def test_graph_mode_equals_pynative():
    logits, uniform = random_logits(), [0.1, 0.5, 0.9, 0.3]
    options = {"do_sample": True, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    results = []
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        slots = slots_of(**options)
        for _ in range(3):
            for slot, token in zip(slots, choose(logits, slots, uniform), strict=True):
                slot.take(int(token), 99)
        results.append([slot.new_ids for slot in slots])
    assert results[0] == results[1]
