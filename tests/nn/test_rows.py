"""Rows that are joined and taken on the host are those of the operators."""

import numpy as np
import pytest
from mindspore import Tensor

from mindvlm.nn import rows
from mindvlm.nn.rows import concatenated, padded, rows_at, rows_between, with_rows

ARRAYS = [np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32) for count in (4, 1, 2)]


@pytest.mark.parametrize("on_host", [True, False])
def test_rows(monkeypatch, on_host):
    monkeypatch.setattr(rows, "works_on_host", lambda: on_host)
    if on_host:
        monkeypatch.setattr(rows, "ops", None)
    tensors = list(map(Tensor, ARRAYS))
    joined = concatenated(tensors)
    np.testing.assert_array_equal(joined.asnumpy(), np.concatenate(ARRAYS))
    indices = np.array([6, 0, 0, 3], np.int32)
    np.testing.assert_array_equal(rows_at(joined, indices).asnumpy(), np.concatenate(ARRAYS)[indices])
    np.testing.assert_array_equal(rows_between(joined, 2, 5).asnumpy(), np.concatenate(ARRAYS)[2:5])
    np.testing.assert_array_equal(padded(tensors[1], 4).asnumpy(), np.pad(ARRAYS[1], ((0, 3), (0, 0))))


@pytest.mark.parametrize("on_host", [True, False])
def test_rows_of_another_tensor(monkeypatch, on_host):
    monkeypatch.setattr(rows, "works_on_host", lambda: on_host)
    first, second = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    given = Tensor(first)
    np.testing.assert_array_equal(with_rows(given, Tensor(second), [2, 0]).asnumpy(), [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(given.asnumpy(), first)


def test_what_is_whole_is_not_copied():
    tensor = Tensor(ARRAYS[0])
    assert concatenated([tensor]) is tensor and concatenated([]) is None
    assert rows_between(tensor, 0, 4) is tensor and rows_at(tensor, np.arange(4, dtype=np.int32)) is tensor
    assert padded(tensor, 4) is tensor
