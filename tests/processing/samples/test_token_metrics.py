"""Loss, accuracy and perplexity of next tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.processing.samples.token_metrics import TokenSums, sum_tokens, token_figures


def test_counted_by_hand():
    # probabilities 1/2, 1/4, 1/4 in both rows; the last one is ignored
    logits = np.log(np.array([[2, 1, 1], [1, 2, 1], [9, 9, 9]], np.float32))
    sums = sum_tokens(logits + 50, np.array([0, 2, -100]))
    assert (sums.correct, sums.tokens) == (1, 2)
    assert sums.loss == pytest.approx(np.log(2) + np.log(4), abs=1e-5)


def test_the_first_of_equal_logits_is_the_prediction():
    assert sum_tokens(np.zeros((2, 5), np.float32), np.array([0, 1])).correct == 1


def test_batches_weigh_the_same_in_the_loss_and_tokens_in_the_perplexity():
    rows = [TokenSums(2.0, 1, 1), TokenSums(), TokenSums(1.0, 0, 1), TokenSums(2.0, 0, 2), TokenSums()]
    expected = {"loss": 1.5, "accuracy": 0.25, "perplexity": pytest.approx(np.exp(5 / 4))}
    assert token_figures(rows, batch_size=2) == expected
    assert token_figures([rows[0], rows[2] + rows[3]]) == expected
    assert token_figures([TokenSums()]) == {}


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 9))
def test_against_the_definition(seed, length, vocab_size):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (length, vocab_size)).astype(np.float32)
    labels = np.where(rng.random(length) < 0.2, -100, rng.integers(0, vocab_size, length))
    sums = sum_tokens(logits, labels)
    kept = np.flatnonzero(labels >= 0)
    wide = np.exp(logits.astype(np.float64))
    losses = [-np.log(wide[row, labels[row]] / wide[row].sum()) for row in kept]
    assert sums.loss == pytest.approx(sum(losses), abs=1e-4)
    assert sums.tokens == len(kept) and 0 <= sums.correct <= len(kept)
