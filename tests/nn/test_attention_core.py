"""The attention with a gradient of its own against torch: values, gradients, slices."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from torch.nn import functional as F

from mindvlm.nn import attention_core as module
from mindvlm.nn.attention_core import AttentionCore, CausalAttentionCore, causal_slices, full_slices


class Weighted(nn.Cell):
    """A loss whose gradient with respect to the attention's output is `weights`."""

    def __init__(self, core: nn.Cell):
        super().__init__()
        self.core = core

    def construct(self, query, key, value, weights):
        return (self.core(query, key, value) * weights).astype(ms.float32).sum()


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"], autouse=True)
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=before)


def noise(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(mine: Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().numpy()
    return np.linalg.norm(mine.asnumpy() - expected) / np.linalg.norm(expected)


def check(core: nn.Cell, query, key, value, *, is_causal: bool, dtype=ms.float32, bound: float = 1e-5) -> None:
    weights = noise(*query.shape[:-1], value.shape[-1], seed=9)
    twins = [torch.tensor(array, requires_grad=True) for array in (query, key, value)]
    expected = F.scaled_dot_product_attention(*twins, is_causal=is_causal, scale=1.0)
    (expected * torch.tensor(weights)).sum().backward()
    inputs = [Tensor(array, dtype) for array in (query, key, value)]
    out = core(*inputs)
    gradients = ms.grad(Weighted(core), (0, 1, 2))(*inputs, Tensor(weights, dtype))
    assert out.dtype == dtype and relative_error(out.astype(ms.float32), expected) < bound
    for gradient, twin in zip(gradients, twins, strict=True):
        assert gradient.dtype == dtype and relative_error(gradient.astype(ms.float32), twin.grad) < bound


@pytest.mark.parametrize("max_scores", [2**21, 20 * 7], ids=["whole", "slices"])
def test_values_and_gradients_are_those_of_torch(monkeypatch, max_scores):
    monkeypatch.setattr(module, "MAX_SCORES_PER_HEAD", max_scores)
    # more queries than keys, values of another width
    query, key, value = noise(3, 33, 8, seed=0), noise(3, 20, 8, seed=1), noise(3, 20, 5, seed=2)
    check(AttentionCore(), query, key, value, is_causal=False)


@pytest.mark.parametrize("length", [16, 37, 64])
def test_causal_values_and_gradients_are_those_of_torch(monkeypatch, length):
    monkeypatch.setattr(module, "MIN_CAUSAL_SLICE", 8)
    shape = (2, 3, length, 4)
    assert len(causal_slices(length)) == min(4, -(-length // 8))
    check(CausalAttentionCore(), *(noise(*shape, seed=seed) for seed in range(3)), is_causal=True)


@pytest.mark.parametrize("float32_scores", [False, True])
def test_several_query_heads_of_one_key_head(monkeypatch, float32_scores):
    """Against torch with every key repeated: values, and gradients summed over the query heads of a key."""
    monkeypatch.setattr(module, "MIN_CAUSAL_SLICE", 8)
    query, key, value = noise(2, 6, 37, 4, seed=0), noise(2, 2, 37, 4, seed=1), noise(2, 2, 37, 4, seed=2)
    weights = noise(*query.shape, seed=9)
    twins = [torch.tensor(array, requires_grad=True) for array in (query, key, value)]
    repeated = [twins[0], *(twin.repeat_interleave(3, dim=1) for twin in twins[1:])]
    expected = F.scaled_dot_product_attention(*repeated, is_causal=True, scale=1.0)
    (expected * torch.tensor(weights)).sum().backward()
    core = module.causal_attention_core(float32_scores=float32_scores)
    inputs = list(map(Tensor, (query, key, value)))
    gradients = ms.grad(Weighted(core), (0, 1, 2))(*inputs, Tensor(weights))
    assert relative_error(core(*inputs), expected) < 1e-5
    for gradient, twin in zip(gradients, twins, strict=True):
        assert gradient.shape == tuple(twin.shape) and relative_error(gradient, twin.grad) < 1e-5


def test_scores_in_float32_are_beyond_float16():
    query, key = (np.full((1, 1, 3, 4), 300, np.float16) * sign for sign in (1, 1))
    query[0, 0, 2, 0] = 301
    key[0, 0, 1, 0] = 290
    value = noise(1, 1, 3, 4, seed=0).astype(np.float16)
    inputs = list(map(Tensor, (query, key, value)))
    plain = module.causal_attention_core()(*inputs).asnumpy()
    wide = module.causal_attention_core(float32_scores=True)(*inputs).asnumpy()
    # 360000 is infinite in float16; in float32 the second key is worth less than the others
    assert not np.isfinite(plain).all()
    np.testing.assert_allclose(wide[0, 0, 2], (value[0, 0, 0] + value[0, 0, 2]) / 2, rtol=5e-3)


def test_16_bits_stay_16_bits(monkeypatch):
    monkeypatch.setattr(module, "MIN_CAUSAL_SLICE", 8)
    arrays = [noise(1, 2, 20, 4, seed=seed) for seed in range(3)]
    check(CausalAttentionCore(), *arrays, is_causal=True, dtype=ms.float16, bound=5e-3)


def test_large_scores_stay_finite():
    query, key, value = (1e3 * noise(1, 2, 9, 4, seed=seed) for seed in range(3))
    gradients = ms.grad(Weighted(CausalAttentionCore()), (0, 1, 2))(*map(Tensor, (query, key, value, value)))
    assert all(np.isfinite(gradient.asnumpy()).all() for gradient in gradients)


def test_slices_cover_all_queries_and_stay_within_the_bound():
    for length in (1, 511, 512, 513, 2048, 4096, 20_000):
        for ranges, num_keys in ((causal_slices(length), length), (full_slices(length, 4096), 4096)):
            starts, stops, seen = zip(*ranges, strict=True)
            assert starts[0] == 0 and starts[1:] == stops[:-1] and stops[-1] == length
            assert max(b - a for a, b in zip(starts, stops, strict=True)) * num_keys <= module.MAX_SCORES_PER_HEAD
            assert seen == (stops if ranges == causal_slices(length) else (4096,) * len(stops))
    assert [len(causal_slices(length)) for length in (512, 1024, 2048)] == [1, 2, 4]
