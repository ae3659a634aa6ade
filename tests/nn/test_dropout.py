import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindvlm.nn.dropout import RowDropout, RowNoise, dropout_counter, new_counter, place_dropout

# the gradient of a Python function, and parameters set between two calls, need it
pytestmark = pytest.mark.usefixtures("pynative")

P, WIDTH = 0.3, 64


class Two(nn.Cell):
    """Two dropouts that share a counter."""

    def __init__(self):
        super().__init__()
        counter = new_counter()
        self.first = RowDropout(P, WIDTH, index=0, counter=counter)
        self.second = RowDropout(P, WIDTH, index=1, counter=counter)

    def construct(self, x):
        return self.first(x), self.second(x)


@pytest.fixture
def two() -> Two:
    return Two().set_train()


def drop(two: Two, count: int) -> tuple[np.ndarray, np.ndarray]:
    dropout_counter(two).set_data(Tensor(count, ms.int32))
    return tuple(out.asnumpy() for out in two(Tensor(np.ones((3, 200, WIDTH), np.float32))))


def test_masks_follow_from_the_counter_and_the_place(two):
    first, second = drop(two, 5)
    again, _ = drop(two, 5)
    later, _ = drop(two, 6)
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.3 and (first != later).mean() > 0.3
    assert (first[0, 0] != first[0, 1]).any()


def test_the_share_that_is_dropped_and_the_mean_are_right(two):
    dropped = np.stack([drop(two, count)[0] for count in range(5)])
    assert (dropped == 0).mean() == pytest.approx(P, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert np.allclose(dropped[dropped > 0], 1 / (1 - P))


def test_the_gradient_has_the_same_mask(two):
    x = Tensor(np.ones((2, 7, WIDTH), np.float32))
    gradient = ms.grad(lambda x: two.first(x).sum())(x)
    np.testing.assert_array_equal(gradient.asnumpy(), two.first(x).asnumpy())


def test_replicas_and_passes_drop_what_one_process_drops(two):
    whole = drop(two, 3)[0].reshape((-1, WIDTH))
    parts = []
    for number in range(2):
        for replica in range(3):
            place_dropout(two, num_passes=2, num_replicas=3, replica=replica)
            dropout_counter(two).set_data(Tensor(3 * 2 + number, ms.int32))
            parts.append(two.first(Tensor(np.ones((100, WIDTH), np.float32))).asnumpy())
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_nothing_is_dropped_outside_of_training(two):
    x = np.ones((1, 4, WIDTH), np.float32)
    assert (two.set_train(False)(Tensor(x))[0].asnumpy() == x).all()


def test_the_counter_is_no_weight(two):
    assert list(two.get_parameters()) == []
    assert dropout_counter(two).name == "num_passes"
    assert dropout_counter(nn.Dense(2, 2)) is None


def test_a_graph_reads_the_counter_as_it_is_now(two):
    class Counting(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.two = two
            self.counter = dropout_counter(two)

        def construct(self, x):
            out, _ = self.two(x)
            one = ops.depend(Tensor(1, ms.int32), out)
            return ops.depend(out, ops.assign_add(self.counter, one))

    ms.set_context(mode=ms.GRAPH_MODE)
    counting, x = Counting().set_train(), Tensor(np.ones((3, 200, WIDTH), np.float32))
    drop(two, 5)
    ms.set_context(mode=ms.GRAPH_MODE)
    outs = [counting(x).asnumpy() for _ in range(2)]
    np.testing.assert_array_equal(outs[0], drop(two, 5)[0])
    np.testing.assert_array_equal(outs[1], drop(two, 6)[0])


def test_noise_is_normal_and_shared_by_replicas():
    counter = new_counter()
    noise = RowNoise(index=0, counter=counter)
    counter.set_data(Tensor(7, ms.int32))
    whole = noise(6, 300).asnumpy()
    assert whole.shape == (6, 300) and abs(whole.mean()) < 0.1 and abs(whole.std() - 1) < 0.1
    assert len(np.unique(whole)) > 1700, "rows of more than one part have no part twice"
    parts = []
    for replica in range(2):
        noise.num_replicas, noise.replica = 2, replica
        parts.append(noise(3, 300).asnumpy())
    np.testing.assert_array_equal(np.concatenate(parts), whole)
