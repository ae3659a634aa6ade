"""The loss without all logits against the plain one and against torch: values and gradients."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor, nn, ops
from torch.nn import functional as F

from mindvlm.nn import loss as loss_module
from mindvlm.nn.loss import IGNORED_LABEL, NextTokenLoss, chunks
from tests.nn.plain_loss import next_token_loss

BATCH_SIZE, LENGTH, HIDDEN_SIZE, VOCAB_SIZE = 3, 11, 8, 37


class Tied(nn.Cell):
    """A table of embeddings that is the head as well."""

    def __init__(self, table: np.ndarray, *, by_chunks: bool):
        super().__init__()
        self.table = Parameter(Tensor(table), name="table")
        self.token_loss = NextTokenLoss()
        self.by_chunks = by_chunks
        self.head = ops.MatMul(transpose_b=True)

    def construct(self, ids, labels):
        states = ops.tanh(ops.gather(self.table, ids, 0))
        if self.by_chunks:
            loss, count = self.token_loss(states, self.table, labels)
            return loss / count
        logits = self.head(states.reshape((-1, HIDDEN_SIZE)), self.table).reshape(ids.shape + (VOCAB_SIZE,))
        return next_token_loss(logits, labels)


class Scaled(nn.Cell):
    """2.5 times the loss."""

    def __init__(self):
        super().__init__()
        self.token_loss = NextTokenLoss()

    def construct(self, states, matrix, labels):
        loss, count = self.token_loss(states, matrix, labels)
        return loss * 2.5, count


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"], autouse=True)
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS", 7)
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 1)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, (BATCH_SIZE, LENGTH)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.4, IGNORED_LABEL, ids).astype(np.int32)
    states = rng.standard_normal((BATCH_SIZE, LENGTH, HIDDEN_SIZE)).astype(np.float32)
    matrix = rng.standard_normal((VOCAB_SIZE, HIDDEN_SIZE)).astype(np.float32)
    return ids, labels, states, matrix


def test_chunks_cover_all_rows_once():
    for num_rows, vocab_size in ((2048, 16000), (5, 16000), (100_000, 151_936), (4096, 50)):
        ranges = chunks(num_rows, vocab_size)
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(num_rows))
        assert len(ranges) <= loss_module.MAX_CHUNKS
    assert chunks(2048, 151_936)[0] == (0, 256)


def test_value_and_gradients_equal_torch(small_chunks, batch):
    _, labels, states, matrix = batch
    twins = [torch.tensor(array, requires_grad=True) for array in (states, matrix)]
    logits = twins[0] @ twins[1].T
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.tensor(labels[:, 1:]).flatten().long(), reduction="sum"
    )
    (2.5 * expected).backward()
    compute = ops.value_and_grad(Scaled().set_train(), (0, 1), has_aux=True)
    (loss, count), gradients = compute(Tensor(states), Tensor(matrix), Tensor(labels))
    assert float(loss) == pytest.approx(2.5 * expected.item(), rel=1e-6)
    assert float(count) == (labels[:, 1:] != IGNORED_LABEL).sum()
    for gradient, twin in zip(gradients, twins, strict=True):
        assert relative_error(gradient.asnumpy(), twin.grad.numpy()) < 5e-6


def relative_error(mine: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(mine - expected) / np.linalg.norm(expected)


def test_a_frozen_matrix_leaves_the_gradient_of_the_states(small_chunks, batch):
    _, labels, states, matrix = batch
    found = []
    for trains in (True, False):
        cell = Scaled().set_train()
        cell.token_loss.matrix_trains = trains
        inputs = Tensor(states), Tensor(matrix), Tensor(labels)
        (loss, _), gradients = ops.value_and_grad(cell, (0, 1), has_aux=True)(*inputs)
        found.append((float(loss), *(gradient.asnumpy() for gradient in gradients)))
    (loss, expected, _), (same_loss, gradient, of_matrix) = found
    assert same_loss == loss
    assert np.array_equal(gradient, expected)
    assert not of_matrix.any()


@pytest.mark.parametrize("is_training", [True, False])
def test_a_tied_table_gets_both_gradients(small_chunks, batch, is_training):
    ids, labels, _, matrix = batch
    results = []
    for by_chunks in (True, False):
        cell = Tied(matrix, by_chunks=by_chunks).set_train(is_training)
        loss, (gradient,) = ops.value_and_grad(cell, None, cell.trainable_params())(Tensor(ids), Tensor(labels))
        results.append((float(loss), gradient.asnumpy()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert relative_error(results[0][1], results[1][1]) < 1e-6


def test_a_batch_without_labels_has_loss_and_gradient_0(batch):
    _, labels, states, matrix = batch
    ignored = Tensor(np.full_like(labels, IGNORED_LABEL))
    cell = NextTokenLoss()
    (loss, count), gradient = ops.value_and_grad(cell, 0, has_aux=True)(Tensor(states), Tensor(matrix), ignored)
    assert (float(loss), float(count)) == (0.0, 0.0)
    assert not gradient.asnumpy().any()


def test_a_certain_wrong_prediction_stays_finite(batch):
    _, labels, states, matrix = batch
    (loss, _), gradient = ops.value_and_grad(NextTokenLoss(), 0, has_aux=True)(
        Tensor(states * 1e3), Tensor(matrix), Tensor(labels)
    )
    assert np.isfinite(float(loss)) and np.isfinite(gradient.asnumpy()).all()
