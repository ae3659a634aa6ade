import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.mixture import Mixture, Permutation, derive_key


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_a_permutation_meets_every_number_once(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_a_permutation_of_millions_spreads_evenly():
    permutation = Permutation(5_000_011, 7)
    drawn = np.array([permutation[i] for i in range(20_000)])
    assert len(set(drawn.tolist())) == 20_000 and drawn.max() < 5_000_011
    shares = np.histogram(drawn, bins=20, range=(0, 5_000_011))[0] / 1000
    assert abs(shares - 1).max() < 0.15
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03


def test_small_permutations_are_all_met():
    orders = Counter(tuple(Permutation(3, key)[i] for i in range(3)) for key in range(600))
    assert len(orders) == 6 and min(orders.values()) > 50


def test_positions_outside_are_refused():
    with pytest.raises(IndexError):
        Permutation(3, 1)[3]


def test_keys_do_not_depend_on_the_process():
    assert derive_key("a", 1) == 0xACB2AFD16F387F9A
    assert derive_key("a", 1) != derive_key("a", 2) != derive_key("b", 2)


@given(
    st.lists(st.tuples(st.integers(2, 60), st.floats(0.5, 3)), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_an_epoch_has_the_share_of_every_dataset_and_no_repeats(datasets, seed, shuffle):
    sizes, weights = [size for size, _ in datasets], [weight for _, weight in datasets]
    mixture = Mixture([str(i) for i in range(len(sizes))], sizes, weights, seed=seed, shuffle=shuffle)
    drawn = [[], [], []]
    for number in range(3 * mixture.epoch_size):
        place = mixture[number]
        drawn[place.epoch].append((place.dataset, place.record))
    for epoch in drawn:
        for dataset, (size, weight) in enumerate(datasets):
            counts = Counter(record for d, record in epoch if d == dataset)
            assert counts.total() == round(weight * size)
            assert max(counts.values()) - (0 if len(counts) < size else min(counts.values())) <= 2
    for dataset, (size, _) in enumerate(datasets):
        counts = Counter(record for epoch in drawn for d, record in epoch if d == dataset)
        fewest = min(counts.values()) if len(counts) == size else 0
        assert max(counts.values()) - fewest <= 1, "every pass goes through all records before the next begins"


def test_half_a_dataset_comes_in_each_of_two_epochs():
    mixture = Mixture(["a", "b"], [40, 10], [0.5, 1.0], seed=3)
    halves = [{mixture[n].record for n in range(e * 30, e * 30 + 30) if mixture[n].dataset == 0} for e in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 20 and not halves[0] & halves[1]


def test_epochs_and_seeds_have_orders_of_their_own():
    mixture = Mixture(["a"], [50], [1.0], seed=1)
    orders = [[mixture[n].record for n in range(e * 50, e * 50 + 50)] for e in (0, 1)]
    orders.append([Mixture(["a"], [50], [1.0], seed=2)[n].record for n in range(50)])
    assert len({tuple(order) for order in orders}) == 3
    assert [pickle.loads(pickle.dumps(mixture))[n].record for n in range(50)] == orders[0]


def test_in_order_without_shuffle():
    mixture = Mixture(["a", "b"], [2, 3], [1.0, 1.0], seed=1, shuffle=False)
    assert [mixture[n][:2] for n in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0)]


def test_a_weight_that_leaves_nothing_is_named():
    with pytest.raises(UserError, match="'tiny': weight 0.1 of 3 records leaves none"):
        Mixture(["tiny"], [3], [0.1], seed=1)
