"""Decoders on the C++ kernels against the Cells that they replace."""

from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import blocks_for, parse_weights
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.linear_plan import ProductRule, choose_products
from mindvlm.nn.mlp import GatedMLP
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import NativeProduct, native_product, native_rules
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.products import DenseProduct
from mindvlm.nn.rotary import decoder_frequencies

pytestmark = pytest.mark.usefixtures("pynative")

SIZES = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=96
)
DIALECTS = {
    "llama": {},
    "grouped": {"num_key_value_heads": 2},
    "logn": {"use_logn_attn": True, "training_length": 8},
    "partial": {"partial_rotary_factor": 0.5},
    "learned": {"position": "learned", "max_position_embeddings": 40},
    "tied": {"tie_word_embeddings": True},
    "biased": {"qkv_bias": True, "num_key_value_heads": 2},
}


class Cached(nn.Cell):
    """Some rows against the cache: -> logits (b, L, V)."""

    def __init__(self, model: CausalLM, caches: nn.CellList):
        super().__init__(auto_prefix=False)
        self.model, self.caches = model, caches

    def construct(self, ids, positions, inv_freq, rows):
        embeds = self.model.embed_tokens(ids)
        return self.model.lm_head(self.model.with_cache(embeds, positions, inv_freq, self.caches, rows))


def weights_of(config: DecoderConfig, dtype: str) -> MemorySource:
    """Weights of a decoder in a dtype of checkpoints."""
    tensors = {}
    for name, shape in parameter_shapes(CausalLM(config)).items():
        values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) * 0.2
        tensors[name] = RawTensor.from_array(values + ("norm" in name)).cast(dtype)
    return MemorySource(tensors)


class Whole(nn.Cell):
    """A model with a decoder under its usual name."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.language_model = CausalLM(config)


def build(config: DecoderConfig, source: MemorySource, rules=(), library=None) -> CausalLM:
    whole = Whole(config).set_train(False)
    choose_products(whole, rules)
    if library:
        use_native_cells(whole, library)
    fill_parameters(whole.language_model, source)
    return whole.language_model


def answers(model: CausalLM, config: DecoderConfig) -> list[np.ndarray]:
    """Logits of a prefill of two of three cache rows, and of two steps after it."""
    run, rng = Cached(model, model.new_caches(3, 32)), np.random.default_rng(1)
    inv_freq = Tensor(np.stack([decoder_frequencies(config)] * 2)[:, None])
    rows, found = Tensor(np.array([2, 0], np.int32)), []
    for positions in ([list(range(9))] * 2, [[9], [5]], [[10], [6]]):
        shape = np.shape(positions)
        ids = Tensor(rng.integers(0, config.vocab_size, shape).astype(np.int32))
        found.append(run(ids, Tensor(np.array(positions, np.int32)), inv_freq, rows).asnumpy())
    return found


def require_close(found: list[np.ndarray], expected: list[np.ndarray], largest: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= largest * np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_checkpoint_s_own_values_give_the_results_of_float32(kernels, dialect, dtype):
    config = DecoderConfig(**{**SIZES, **DIALECTS[dialect]})
    source = weights_of(config, dtype)
    native = build(config, source, native_rules("auto", "CPU"), kernels)
    assert isinstance(native.layers[0].mlp.up_proj.product, NativeProduct)
    require_close(answers(native, config), answers(build(config, source), config), 2e-6)


def test_projections_and_the_gated_block_are_one_operator_each(kernels):
    """Many rows, so that the block runs in parts."""
    rng, mlp = np.random.default_rng(0), GatedMLP(32, 40)
    x = Tensor(rng.standard_normal((2, 300, 32)).astype(np.float32))
    choose_products(mlp, [ProductRule(".*", partial(native_product, library=kernels, weight_format="auto"))])
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in parameter_shapes(mlp).items()}
    fill_parameters(mlp, MemorySource({name: RawTensor.from_array(value) for name, value in weights.items()}))
    expected = mlp(x).asnumpy()
    use_native_cells(mlp, kernels)
    assert mlp.native is not None
    require_close([mlp(x).asnumpy()], [expected], 1e-6)

    model = build(
        DecoderConfig(**SIZES), weights_of(DecoderConfig(**SIZES), "float16"), native_rules("auto", "CPU"), kernels
    )
    assert all(layer.mlp.native and layer.self_attn.joint for layer in model.layers)


def test_a_graph_gives_the_results_of_pynative_mode(kernels):
    config = DecoderConfig(**SIZES, num_key_value_heads=2)
    source = weights_of(config, "bfloat16")
    expected = answers(build(config, source), config)
    ms.set_context(mode=ms.GRAPH_MODE)
    require_close(answers(build(config, source, native_rules("auto", "CPU"), kernels), config), expected, 2e-6)


@pytest.mark.parametrize(("text", "largest"), [("16bit", 2e-3), ("int8", 0.05), ("int4", 0.4)])
def test_fewer_bits_change_the_results_a_little(kernels, text, largest):
    config = DecoderConfig(**SIZES)
    source = weights_of(config, "float32")
    model = build(config, source, native_rules(text, "CPU"), kernels)
    require_close(answers(model, config), answers(build(config, source), config), largest)
    num_bytes = model.layers[0].mlp.up_proj.product.num_bytes
    assert num_bytes == {"16bit": 2 * 6144, "int8": 6144 * 34 // 32, "int4": 6144 * 18 // 32}[text]


def test_formats_of_parts(kernels):
    config = DecoderConfig(**SIZES)
    model = build(config, weights_of(config, "float32"), native_rules("int4,head=float32,embeddings=int8", "CPU"))
    assert isinstance(model.lm_head.product, DenseProduct)
    assert model.embed_tokens.product.weight_format == "int8"
    assert model.layers[1].self_attn.o_proj.product.weight_format == "int4"


def test_the_key_weights():
    assert parse_weights("int4") == {"decoder": "int4", "head": "int8", "embeddings": "16bit", "towers": "16bit"}
    assert parse_weights("int4k")["head"] == "int8"
    found = [blocks_for(kind, width) for kind in ("int8", "int4", "int4k", "16bit") for width in (512, 96, 40)]
    assert found == ["q8_0", "q8_0", None, "q4_0", "q4_0", None, "q4_K", "q4_0", None, None, None, None]
    assert parse_weights("towers=int8")["decoder"] == "auto"
    for wrong in ("int3", "int8,int4", "tail=int8", "head=", "head=int8,head=int4"):
        with pytest.raises(UserError, match="expected one of auto"):
            parse_weights(wrong)


def test_another_device_refuses_the_key():
    assert native_rules("auto", "Ascend") == ()
    with pytest.raises(UserError, match="the device is Ascend; leave it out"):
        native_rules("int8", "Ascend")


def test_without_kernels_formats_are_ignored_with_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr("mindvlm.nn.native_products.open_library", lambda: None)
    assert native_rules("auto", "CPU") == ()
    assert not recwarn
    with pytest.warns(UserWarning, match="weights is 'int8' but there are no native kernels; weights are float32"):
        assert native_rules("int8", "CPU") == ()
