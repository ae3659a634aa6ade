"""Decoders on the C++ kernels against the Cells that they replace."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import blocks_for, parse_weights
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.linear_plan import choose_products
from mindvlm.nn.lora import LoraConfig, adapt
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.products import DenseProduct
from mindvlm.nn.rotary import decoder_frequencies

pytestmark = pytest.mark.usefixtures("pynative")

SIZES = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=96
)
PLAIN = {"norm": "layer_norm", "mlp": "plain", "o_bias": True, "head_bias": True}
DIALECTS = {
    "llama": {},
    "grouped": {"num_key_value_heads": 2},
    "logn": {"use_logn_attn": True, "training_length": 8},
    "partial": {"partial_rotary_factor": 0.5},
    "learned": {"position": "learned", "max_position_embeddings": 40},
    "tied": {"tie_word_embeddings": True},
    "biased": {"o_bias": True, "num_key_value_heads": 2},
    "unbiased": {"qkv_bias": False},
    "phi": {**PLAIN, "residual": "parallel", "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    "opt": {**PLAIN, "position": "learned", "max_position_embeddings": 40, "hidden_act": "relu"},
    "no_mlp_bias": {"mlp": "plain", "mlp_bias": False, "hidden_act": "gelu"},
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
    assert native.native is not None
    require_close(answers(native, config), answers(build(config, source), config), 2e-6)


def test_all_layers_are_one_operator(kernels):
    """Many rows, so that a feed-forward block runs in parts."""
    config = DecoderConfig(**SIZES, hidden_act="gelu")
    source, rng = weights_of(config, "float16"), np.random.default_rng(0)
    ids = Tensor(rng.integers(0, config.vocab_size, (1, 700)).astype(np.int32))
    positions, inv_freq = Tensor(np.arange(700, dtype=np.int32)[None]), Tensor(decoder_frequencies(config))
    found = {}
    for name, rules in {"native": native_rules("auto", "CPU"), "dense": ()}.items():
        model = build(config, source, rules, kernels)
        assert (model.native is None) == (name == "dense")
        caches = model.new_caches(1, 704)
        found[name] = [Cached(model, caches)(ids, positions, inv_freq, None).asnumpy()]
        found[name] += [cache.asnumpy() for layer in caches for cache in (layer.key, layer.value)]
    require_close(found["native"], found["dense"], 2e-6)


# the feed-forward blocks have 512 rows, after which few are left
@pytest.mark.parametrize("lengths", [(40, 3), (1, 2), (64, 64), (*[64] * 8, 1), (*[64] * 8, 15)])
def test_padding_is_not_computed_and_changes_no_bit(kernels, lengths):
    config = DecoderConfig(**SIZES, num_key_value_heads=2)
    model = build(config, weights_of(config, "bfloat16"), native_rules("auto", "CPU"), kernels)
    count = len(lengths)
    embeds = np.random.default_rng(0).standard_normal((count, 64, config.hidden_size)).astype(np.float32)
    positions = np.tile(np.arange(5, 69, dtype=np.int32), (count, 1))
    is_padding = np.arange(64) >= np.array(lengths)[:, None]
    inv_freq, rows = decoder_frequencies(config), np.arange(count, 0, -1, dtype=np.int32)
    found = {}
    for name, given in {"computed": positions, "marked": np.where(is_padding, -1, positions)}.items():
        caches = model.new_caches(count + 1, 80)
        states = model.with_cache(*map(Tensor, (embeds, given, inv_freq)), caches, Tensor(rows)).asnumpy()
        found[name] = states, [cache.asnumpy() for layer in caches for cache in (layer.key, layer.value)]
    np.testing.assert_array_equal(found["marked"][0][~is_padding], found["computed"][0][~is_padding])
    is_few = (~is_padding).sum() < 16
    assert is_few or not found["marked"][0][is_padding].any()
    for ours, all_written in zip(found["marked"][1], found["computed"][1], strict=True):
        for row, length in zip(rows, lengths, strict=True):
            np.testing.assert_array_equal(ours[row, :, : 5 + length], all_written[row, :, : 5 + length])
            assert not ours[row, :, 5 + length :].any()


def test_layers_with_an_adapter_are_several_operators(kernels):
    config = DecoderConfig(**SIZES)
    source = weights_of(config, "float16")
    expected = answers(build(config, source), config)
    model = build(config, source, native_rules("auto", "CPU"))
    adapt(model.layers[1].mlp.up_proj, LoraConfig())
    use_native_cells(model, kernels)
    assert model.native is None and model.layers[1].self_attn.native
    require_close(answers(model, config), expected, 2e-6)


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
    assert parse_weights("int8c") == {"decoder": "int8c", "head": "int8c", "embeddings": "16bit", "towers": "16bit"}
    assert [blocks_for("int8c", width) for width in (512, 96, 40, 0)] == ["q8_c[512]", "q8_c[96]", None, None]
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
    # `open_library` has given a warning
    assert native_rules("int8", "CPU") == ()
    monkeypatch.setenv("MINDVLM_NATIVE", "off")
    assert native_rules("auto", "CPU") == ()
    assert not recwarn
    with pytest.warns(UserWarning, match="weights is 'int8' but native kernels are off; weights are float32"):
        assert native_rules("int8", "CPU") == ()
