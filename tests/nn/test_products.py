"""The seam behind Linear: a second kind of weight product, put into models by a plan that their files do not know."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

import mindvlm
from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core import runtime
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.linear import BiasedHead, Head, Linear
from mindvlm.nn.linear_plan import ProductRule, choose_products
from mindvlm.nn.lora import LoraConfig, adapt
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.products import DenseProduct, WeightProduct
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.parallel.layers import RowParallelLinear
from mindvlm.parallel.mesh import Mesh
from tests.nn.plain_loss import next_token_loss
from tests.tiny_vary import write_tiny_vary

BLOCK_ROWS = 5
SIZES = dict(
    vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, intermediate_size=24
)


def packed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of float32 rows and the scale of each row."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    return np.rint(rows / scale).astype(np.int8), scale


def rounded(matrix: np.ndarray) -> np.ndarray:
    """The float32 matrix that an `Int8Product` computes with."""
    codes, scale = packed(matrix)
    return codes * scale


class Int8Product(WeightProduct):
    """int8 codes with one scale an output channel, packed while blocks of rows are read."""

    def __init__(self, shape, dtype):
        super().__init__(shape, dtype)
        self.codes = Parameter(initializer("zeros", shape, ms.int8), name="codes", requires_grad=False)
        self.scale = Parameter(initializer("zeros", (shape[0], 1), dtype), name="scale", requires_grad=False)
        self.matmul = ops.MatMul(transpose_b=True)

    def load(self, read):
        starts = range(0, self.shape[0], BLOCK_ROWS)
        blocks = [packed(read(start, min(start + BLOCK_ROWS, self.shape[0])).to_float32()) for start in starts]
        self.codes.set_data(Tensor(np.concatenate([codes for codes, _ in blocks])))
        self.scale.set_data(Tensor(np.concatenate([scale for _, scale in blocks])))

    def construct(self, x):
        return self.matmul(x, self.codes.astype(x.dtype)) * self.scale.reshape((1, -1))

    def rows(self, ids):
        return ops.gather(self.codes, ids, 0).astype(self.dtype) * ops.gather(self.scale, ids, 0)

    def matrix(self, x):
        return self.codes.astype(x.dtype) * self.scale


class BlockSource(MemorySource):
    """bfloat16 tensors; remembers the most elements that were read at once from each."""

    def __init__(self, shapes):
        self.largest_read = {}
        arrays = {name: noise(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        super().__init__({name: RawTensor.from_array(array).cast("bfloat16") for name, array in arrays.items()})

    def read_range(self, name, start, stop):
        self.largest_read[name] = max(self.largest_read.get(name, 0), stop - start)
        return super().read_range(name, start, stop)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def restored_mode():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


def plan(*patterns: str) -> tuple[ProductRule, ...]:
    """Returns rules that give `Int8Product`s to the names of these patterns."""
    return tuple(ProductRule(pattern, Int8Product) for pattern in patterns)


def test_the_dense_product_is_what_a_model_is_built_with_and_what_no_plan_keeps():
    model = CausalLM(DecoderConfig(**SIZES))
    choose_products(model, ())
    products = [cell for _, cell in model.cells_and_names() if isinstance(cell, WeightProduct)]
    assert len(products) == 2 * 7 + 2 and all(isinstance(product, DenseProduct) for product in products)
    assert model.lm_head.product.num_bytes == 24 * 16 * 4
    assert model.lm_head.weight is model.lm_head.product.weight


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_int8_products_streams_and_computes(tied, mode):
    config = DecoderConfig(**SIZES, tie_word_embeddings=tied)
    patterns = (r"layers\.\d+\..*", "embed_tokens" if tied else "lm_head")
    model, dense = CausalLM(config).set_train(False), CausalLM(config).set_train(False)
    shapes = parameter_shapes(dense)
    choose_products(model, plan(*patterns))
    assert parameter_shapes(model) == shapes

    source = BlockSource(shapes)
    fill_parameters(model, source)
    is_packed = {name: "_proj.weight" in name or name == f"{patterns[1]}.weight" for name in shapes}
    for name, shape in shapes.items():
        whole = int(np.prod(shape))
        assert source.largest_read[name] == (BLOCK_ROWS * shape[1] if is_packed[name] else whole), name
    arrays = {name: source.read(name).to_float32() for name in shapes}
    fill_parameters(
        dense, MemorySource({name: rounded(array) if is_packed[name] else array for name, array in arrays.items()})
    )

    names = [parameter.name for parameter in model.get_parameters()]
    assert len(set(names)) == len(names) and "layers.1.mlp.up_proj.product.codes" in names
    assert model.layers[0].mlp.up_proj.product.num_bytes == 24 * 16 + 24 * 4
    ms.set_context(mode=mode)
    ids, inv_freq = Tensor(np.array([[3, 1, 4, 1]], np.int32)), Tensor(inverse_frequencies(8, 10000.0))
    logits = [lm.lm_head(lm(lm.embed_tokens(ids), inv_freq)).asnumpy() for lm in (model, dense)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def loaded(cell: nn.Cell) -> nn.Cell:
    """The Cell, or one of its parts, filled with noise."""
    shapes = parameter_shapes(cell)
    fill_parameters(cell, MemorySource({name: noise(*shape, seed=len(name)) for name, shape in shapes.items()}))
    return cell


def int8(cell: Linear) -> Linear:
    cell.set_product(Int8Product(cell.product.shape, cell.product.dtype))
    return cell


def test_an_adapter_stands_beside_any_product():
    linear = int8(Linear(6, 4))
    adapt(linear, LoraConfig(rank=3, alpha=6.0))
    loaded(linear)
    assert list(parameter_shapes(linear)) == ["weight", "bias", "lora_A", "lora_B"]
    x = noise(5, 6, seed=9)
    a, b = linear.lora_A.asnumpy(), linear.lora_B.asnumpy()
    base = rounded(noise(4, 6, seed=6))
    expected = x @ base.T + 2.0 * x @ a.T @ b.T + linear.bias.asnumpy()
    np.testing.assert_allclose(linear(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-5)

    by_x = ops.grad(lambda x: linear(x).sum())(Tensor(x)).asnumpy()
    np.testing.assert_allclose(by_x, np.ones((5, 4)) @ (base + 2.0 * b @ a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("kind", [Head, BiasedHead])
def test_the_loss_of_a_head_is_that_of_its_logits(kind, is_adapted):
    head = int8(kind(6, 4))
    if is_adapted:
        adapt(head, LoraConfig(rank=3))
    loaded(head)
    head.token_loss.matrix_trains = False
    states, labels = Tensor(noise(2, 4, 6)), Tensor(np.array([[0, 1, 2, 3], [-100, 3, -100, 1]], np.int32))
    loss, count = head.loss_sum(states, labels)
    mean = next_token_loss(head(states), labels)
    np.testing.assert_allclose(loss.asnumpy() / count.asnumpy(), mean.asnumpy(), rtol=1e-5)


def test_a_divided_linear_takes_any_product():
    linear = loaded(int8(RowParallelLinear(6, 4, mesh=Mesh())))
    x = noise(5, 6)
    expected = x @ rounded(noise(4, 6, seed=6)).T + linear.bias.asnumpy()
    np.testing.assert_allclose(linear(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_loaded_model_answers_with_the_products_of_a_plan(tmp_path, monkeypatch):
    rules = plan(r".*\.layers\..*_proj", r".*\.lm_head", r".*\.embed_tokens")
    start = runtime.start
    monkeypatch.setattr(runtime, "start", lambda config: dataclasses.replace(start(config), linear=rules))
    vlm = mindvlm.load(write_tiny_vary(tmp_path), device="cpu", mode="pynative", weights="float32", cache=False)
    decoder = vlm.model.language_model
    for cell in (decoder.embed_tokens, decoder.lm_head, decoder.layers[0].self_attn.q_proj):
        assert isinstance(cell.product, Int8Product)
    assert isinstance(vlm.model.mm_projector.product, DenseProduct)
    assert len(vlm.chat("What is this?", max_new_tokens=2).ids) == 2
