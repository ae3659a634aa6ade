"""The small Cells against torch."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn, ops

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core.errors import UserError
from mindvlm.nn.attention import causal_mask
from mindvlm.nn.config import grid_size
from mindvlm.nn.kv_cache import LayerKVCache, cache_indices
from mindvlm.nn.layout import permute_rows, widen
from mindvlm.nn.linear import Embedding, Linear
from mindvlm.nn.loss import IGNORED_LABEL
from mindvlm.nn.mlp import ACTIVATIONS, GatedMLP
from mindvlm.nn.norm import LayerNorm, RMSNorm
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.patches import Conv1x1, Conv3x3, PatchConv
from mindvlm.nn.products import to_tensor
from mindvlm.nn.rotary import apply_rotary, inverse_frequencies, logn_scale, rotary_cos_sin
from mindvlm.nn.splice import splice_sources
from tests.nn.plain_loss import next_token_loss

pytestmark = pytest.mark.usefixtures("pynative")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomize(cell: nn.Cell) -> nn.Cell:
    for seed, parameter in enumerate(cell.get_parameters()):
        parameter.set_data(Tensor(noise(*parameter.shape, seed=seed + 10)))
    return cell


def tensor_of(parameter) -> torch.Tensor:
    return torch.from_numpy(parameter.asnumpy())


def assert_close(actual, expected, atol: float = 2e-6):
    np.testing.assert_allclose(actual.asnumpy(), expected.numpy(), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(has_bias):
    cell, x = randomize(Linear(6, 4, has_bias=has_bias)), noise(2, 3, 6)
    bias = tensor_of(cell.bias) if has_bias else None
    assert_close(cell(Tensor(x)), torch.nn.functional.linear(torch.from_numpy(x), tensor_of(cell.weight), bias))


def test_embedding():
    cell = randomize(Embedding(7, 3))
    ids = np.array([[1, 6], [0, 1]], np.int32)
    np.testing.assert_array_equal(cell(Tensor(ids)).asnumpy(), cell.weight.asnumpy()[ids])


@pytest.mark.parametrize("rows", [3, 3000])
def test_norms(rows):
    # above the size at which broadcasting is written out, and below
    x = noise(rows, 16) * 3 + 1
    layer_norm, rms_norm = randomize(LayerNorm(16, eps=1e-5)), randomize(RMSNorm(16, eps=1e-6))
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(x), (16,), tensor_of(layer_norm.weight), tensor_of(layer_norm.bias), 1e-5
    )
    assert_close(layer_norm(Tensor(x)), expected, atol=1e-5)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (16,), tensor_of(rms_norm.weight), 1e-6)
    assert_close(rms_norm(Tensor(x)), expected, atol=1e-5)


def test_norms_keep_half_precision_and_compute_in_single():
    x = np.full((1, 8), 300.0, np.float16)
    x[0, 0] = 100.0
    out = RMSNorm(8, eps=1e-6, dtype=ms.float16)(Tensor(x))
    assert out.dtype == ms.float16
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x).float(), (8,), None, 1e-6)
    np.testing.assert_allclose(out.asnumpy(), expected.numpy(), rtol=2e-3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gelu", torch.nn.functional.gelu),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("silu", torch.nn.functional.silu),
        ("gelu_new", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("gelu_pytorch_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations(name, expected):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    assert_close(ACTIVATIONS[name]()(Tensor(x)), expected(torch.from_numpy(x)), atol=1e-6)
    twin = torch.tensor(x, requires_grad=True)
    expected(twin).sum().backward()
    gradient = ops.grad(lambda x: ACTIVATIONS[name]()(x).sum())(Tensor(x))
    assert_close(gradient, twin.grad, atol=2e-6)


def test_gated_mlp_activates_the_gate_only():
    cell, x = randomize(GatedMLP(6, 10)), noise(2, 3, 6)
    t = torch.from_numpy(x)
    gate, up, down = (tensor_of(linear.weight) for linear in (cell.gate_proj, cell.up_proj, cell.down_proj))
    assert_close(cell(Tensor(x)), (torch.nn.functional.silu(t @ gate.T) * (t @ up.T)) @ down.T, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (9, 13)])
def test_patch_convolution(size):
    cell = randomize(PatchConv(3, 5, 4, has_bias=True))
    x = noise(2, 3, *size)
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), tensor_of(cell.weight), tensor_of(cell.bias), stride=4)
    assert expected.shape[2:] == grid_size(list(size), 4)
    assert_close(cell(Tensor(x)), expected.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_of_three_by_three(grid, stride):
    cell, x = randomize(Conv3x3(3, 5, grid, stride=stride)), noise(2, *grid, 3)
    image = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(image, tensor_of(cell.weight), stride=stride, padding=1)
    assert cell.out_grid == expected.shape[2:]
    assert_close(cell(Tensor(x)), expected.permute(0, 2, 3, 1), atol=1e-5)


def test_convolution_of_one_by_one():
    cell, x = randomize(Conv1x1(3, 5)), noise(2, 4, 6, 3)
    expected = torch.nn.functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), tensor_of(cell.weight))
    assert_close(cell(Tensor(x)), expected.permute(0, 2, 3, 1), atol=1e-5)


def test_permuting_rows_is_transposing():
    x = noise(2, 3, 4, 5)
    for permutation in ((0, 2, 1), (2, 0, 1), (1, 0, 2)):
        np.testing.assert_array_equal(permute_rows(Tensor(x), permutation).asnumpy(), x.transpose(*permutation, 3))


def test_widening_only_what_is_large():
    small = Tensor(noise(8))
    assert widen(small, Tensor(noise(2, 8))) is small
    assert widen(small, Tensor(noise(5000, 8))).shape == (5000, 8)


def test_rotation_is_that_of_the_angles():
    x, positions = noise(2, 3, 4, 8), np.array([[0, 1, 2, 3], [5, 6, 7, 900]], np.int32)
    inv_freq = inverse_frequencies(8, 10000.0)
    cos, sin = rotary_cos_sin(Tensor(positions), Tensor(inv_freq), 3)
    actual = apply_rotary(Tensor(x), cos, sin).asnumpy()
    # halves are the real and imaginary part
    angles = positions[:, None, :, None] * inv_freq.astype(np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1), atol=1e-4)
    np.testing.assert_array_equal(actual[0, :, 0], x[0, :, 0])


def test_a_part_of_a_head_turns_and_the_rest_passes():
    x, positions = noise(2, 3, 4, 10), np.array([[0, 1, 2, 3], [5, 6, 7, 900]], np.int32)
    cos, sin = rotary_cos_sin(Tensor(positions), Tensor(inverse_frequencies(4, 10000.0)), 3)
    actual = apply_rotary(Tensor(x), cos, sin).asnumpy()
    np.testing.assert_array_equal(actual[..., :4], apply_rotary(Tensor(x[..., :4]), cos, sin).asnumpy())
    np.testing.assert_array_equal(actual[..., 4:], x[..., 4:])


def test_logn_scale_of_the_published_slots():
    positions = Tensor(np.array([[0, 8191, 8192, 16383]], np.int32))
    scale = logn_scale(positions, 8192)
    assert scale.shape == (1, 1, 4, 1)
    np.testing.assert_allclose(scale.asnumpy().reshape(-1), [1, 1, 1.0000135, 1.0769231], rtol=1e-6)


def test_causal_mask_hides_later_slots():
    mask = causal_mask(
        Tensor(np.array([[0, 1], [2, 3]], np.int32)), Tensor(np.arange(4, dtype=np.int32)), 2, ms.float32
    )
    assert mask.shape == (2, 2, 2, 4)
    visible = mask.asnumpy() == 0
    assert visible[0, 0].tolist() == [[True, False, False, False], [True, True, False, False]]
    assert visible[1, 1].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert mask.asnumpy()[~visible].max() == np.finfo(np.float32).min


def test_cache_writes_rows_at_their_own_positions():
    cache = LayerKVCache(2, 3, 5, 4)
    key, value = noise(2, 3, 2, 4), noise(2, 3, 2, 4, seed=1)
    positions = np.array([[0, 1], [3, 4]], np.int32)
    keys, values = cache(Tensor(key), Tensor(value), cache_indices(Tensor(positions), 3))
    for written, source in ((keys.asnumpy(), key), (values.asnumpy(), value)):
        expected = np.zeros((2, 3, 5, 4), np.float32)
        expected[0, :, :2], expected[1, :, 3:] = source[0], source[1]
        np.testing.assert_array_equal(written, expected)
    np.testing.assert_array_equal(cache.key.asnumpy(), keys.asnumpy())


def test_loss_is_the_mean_cross_entropy_of_the_next_tokens():
    logits = noise(2, 5, 7)
    labels = np.array([[1, 2, IGNORED_LABEL, 3, 6], [0] + [IGNORED_LABEL] * 3 + [4]], np.int32)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1].reshape(-1, 7)), torch.from_numpy(labels[:, 1:].reshape(-1)).long()
    )
    assert_close(next_token_loss(Tensor(logits), Tensor(labels)), expected)
    ignored = np.full_like(labels, IGNORED_LABEL)
    assert next_token_loss(Tensor(logits), Tensor(ignored)).asnumpy() == 0


def test_splice_takes_pictures_in_reading_order():
    pad = 9
    ids = np.array([[1, pad, pad, 2, pad, pad], [3, 4, 5, 6, 7, 8], [pad, pad, 1, 1, 1, 1]])
    sources = splice_sources(ids, 3, 2, pad)
    expected = np.arange(18).reshape(3, 6)
    expected[0, [1, 2, 4, 5]] = [18, 19, 20, 21]
    expected[2, :2] = [22, 23]
    np.testing.assert_array_equal(sources, expected)
    with pytest.raises(UserError, match=r"6 image placeholders but the images give 4 feature rows \(2 images of 2\)"):
        splice_sources(ids, 2, 2, pad)


def test_splice_cuts_rows_within_a_picture():
    pad = -200
    ids = np.array([[1, pad, pad, pad, pad, 2], [pad, pad, 3, 4, 5, 6]])
    sources = splice_sources(ids, 3, 2, pad, max_length=4)
    # 8 token embeddings, then the pictures' rows; the second picture of the first row lost one
    np.testing.assert_array_equal(sources, [[0, 8, 9, 10], [12, 13, 6, 7]])
    np.testing.assert_array_equal(splice_sources(ids, 3, 2, pad, max_length=9), splice_sources(ids, 3, 2, pad))


class TwoLinears(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first = Linear(3, 2)
        self.second = Linear(2, 3, has_bias=False, dtype=ms.float16)


class ListingSource(MemorySource):
    """Lists the names of the tensors in the order in which they are read."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.read_names = []

    def read_range(self, name, start, stop):
        self.read_names.append(name)
        return super().read_range(name, start, stop)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", [ms.float32, ms.float16, ms.bfloat16])
def test_a_tensor_is_converted_from_the_dtype_it_is_stored_in(dtype, target):
    stored = RawTensor.from_array(noise(3, 4)).cast(dtype)
    tensor = to_tensor("w", stored, target)
    assert tensor.dtype == target and tensor.shape == (3, 4)
    expected = stored if target == ms.float32 else stored.cast("float16" if target == ms.float16 else "bfloat16")
    np.testing.assert_array_equal(tensor.astype(ms.float32).asnumpy(), expected.to_float32())


def test_filling_parameters():
    cell = TwoLinears()
    shapes = parameter_shapes(cell)
    assert shapes == {"first.weight": (2, 3), "first.bias": (2,), "second.weight": (3, 2)}
    arrays = {name: noise(*shape) for name, shape in shapes.items()}
    source = ListingSource(arrays)
    fill_parameters(cell, source)
    assert source.read_names == list(shapes)
    np.testing.assert_array_equal(cell.first.weight.asnumpy(), arrays["first.weight"])
    np.testing.assert_array_equal(cell.second.weight.asnumpy(), arrays["second.weight"].astype(np.float16))
    with pytest.raises(UserError, match=r"first.weight has shape \[3, 2\]; the model expects \[2, 3\]"):
        fill_parameters(cell, MemorySource({name: noise(3, 2) for name in shapes}))


def raw(*values: float) -> RawTensor:
    return RawTensor.from_array(np.array(values, np.float32))


def test_values_beyond_half_precision_are_refused():
    with pytest.raises(UserError, match="tensor w has values beyond float16"):
        to_tensor("w", raw(1.0, 7e4), ms.float16)
    assert np.isinf(to_tensor("w", raw(np.inf), ms.float16).asnumpy()).all()
    bfloat16 = to_tensor("w", raw(1.0, 7e4), ms.bfloat16)
    assert bfloat16.dtype == ms.bfloat16
    assert ops.shape(bfloat16) == (2,)
