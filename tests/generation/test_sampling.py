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
from mindvlm.generation.graphs import pad_rows
from mindvlm.generation.sampling import EMPTY, Sampler

VOCAB_SIZE, NUM_SLOTS = 23, 16
ROWS = [[3, 4, 5, 3, 4], [7, 7, 7, 7, 7, 7], [1, 2, 1, 3, 1, 2, 0, 1], [22]]


@pytest.fixture(autouse=True)
def pynative():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


def random_logits(num_rows: int = len(ROWS), seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((num_rows, VOCAB_SIZE))).astype(np.float32)


def make_sampler(rows=ROWS, **options) -> Sampler:
    config = GenerationConfig(**options)
    sampler = Sampler(config, batch_size=len(rows), vocab_size=VOCAB_SIZE, num_slots=NUM_SLOTS)
    sampler.history.set_data(Tensor(pad_rows(rows, NUM_SLOTS, EMPTY)))
    return sampler


def counts_of(rows) -> Tensor:
    return Tensor(np.array([len(row) for row in rows], np.int32))


def expected_rows(processor, logits: np.ndarray, rows=ROWS) -> np.ndarray:
    """transformers knows no rows of different length: each alone."""
    return np.stack(
        [processor(torch.tensor([row]), torch.from_numpy(line[None].copy()))[0].numpy() for row, line in
         zip(rows, logits, strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_repetition_penalty(penalty):
    logits = random_logits()
    sampler = make_sampler(repetition_penalty=penalty)
    actual = sampler.penalise_repetition(Tensor(logits), sampler.history.value()).asnumpy()
    np.testing.assert_allclose(actual, expected_rows(RepetitionPenaltyLogitsProcessor(penalty), logits), rtol=1e-6)


def test_padding_is_never_penalised():
    # every token of a short row's padding would otherwise be id 0 (or the end token)
    logits = np.full((2, VOCAB_SIZE), 2.0, np.float32)
    sampler = make_sampler([[5], [1, 2, 3, 4, 6]], repetition_penalty=2.0)
    actual = sampler.penalise_repetition(Tensor(logits), sampler.history.value()).asnumpy()
    assert np.flatnonzero(actual[0] != 2.0).tolist() == [5]
    assert np.flatnonzero(actual[1] != 2.0).tolist() == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeated_ngram(size):
    logits = random_logits()
    sampler = make_sampler(no_repeat_ngram_size=size)
    actual = sampler.forbid_repeated_ngrams(Tensor(logits), sampler.history.value(), counts_of(ROWS)).asnumpy()
    expected = expected_rows(NoRepeatNGramLogitsProcessor(size), logits)
    banned = np.isneginf(expected)
    assert banned.any()
    np.testing.assert_array_equal(actual < -1e29, banned)
    np.testing.assert_array_equal(actual[~banned], logits[~banned])


def test_generated_tokens_count_as_repetition():
    sampler = make_sampler([[1], [2]], no_repeat_ngram_size=1)
    logits = Tensor(random_logits(2))
    uniform = Tensor(np.zeros(2, np.float32))
    seen = [{1}, {2}]
    for count in range(1, 10):
        ids = sampler(logits, Tensor(np.full(2, count, np.int32)), uniform).asnumpy()
        for row in range(2):
            allowed = [token for token in np.argsort(-logits.asnumpy()[row]) if token not in seen[row]]
            assert ids[row] == allowed[0]
            seen[row].add(int(ids[row]))


def drawn_shares(logits: np.ndarray, num_draws: int, **options) -> np.ndarray:
    """Share of each token over evenly spread uniform numbers: the exact distribution up to 1 / num_draws."""
    rows = [[0]] * num_draws
    sampler = make_sampler(rows, do_sample=True, **options)
    uniform = ((np.arange(num_draws) + 0.5) / num_draws).astype(np.float32)
    ids = sampler(Tensor(np.repeat(logits, num_draws, 0)), counts_of(rows), Tensor(uniform)).asnumpy()
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
    uniform = np.random.default_rng(1).random(num_draws).astype(np.float32)
    ids = make_sampler(rows, do_sample=True)(
        Tensor(np.repeat(logits, num_draws, 0)), counts_of(rows), Tensor(uniform)
    ).asnumpy()
    observed = np.bincount(ids, minlength=VOCAB_SIZE)
    statistic = ((observed - num_draws * expected) ** 2 / (num_draws * expected)).sum()
    # 22 degrees of freedom: 48.3 is passed once in a thousand times
    assert statistic < 48.3


def test_the_largest_uniform_number_stays_among_the_kept():
    logits = np.zeros((1, VOCAB_SIZE), np.float32)
    logits[0, :3] = 20
    almost_one = Tensor(np.array([np.nextafter(np.float32(1), np.float32(0))]))
    for options in ({"top_k": 3}, {"top_p": 0.9}):
        ids = make_sampler([[0]], do_sample=True, **options)(Tensor(logits), counts_of([[0]]), almost_one)
        assert ids.asnumpy()[0] < 3


def test_greedy_takes_the_largest_and_draws_nothing():
    logits = random_logits()
    for value in (0.0, 0.99):
        uniform = Tensor(np.full(len(ROWS), value, np.float32))
        ids = make_sampler(temperature=9.0, top_k=5)(Tensor(logits), counts_of(ROWS), uniform)
        np.testing.assert_array_equal(ids.asnumpy(), logits.argmax(-1))


def test_graph_mode_equals_pynative():
    logits, uniform = random_logits(), np.array([0.1, 0.5, 0.9, 0.3], np.float32)
    options = {"do_sample": True, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    results = []
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        sampler = make_sampler(**options)
        ids = [sampler(Tensor(logits), counts_of(ROWS) + i, Tensor(uniform)).asnumpy() for i in range(3)]
        results.append((np.stack(ids), sampler.history.asnumpy()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
