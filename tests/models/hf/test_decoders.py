"""Keys of a language model's config.json: supported values, and those that are refused."""

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mindvlm.checkpoint import MemorySource
from mindvlm.convert.reference.rotary import inverse_frequencies as reference_frequencies
from mindvlm.convert.reference.rotary import scaled_frequencies
from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import decoder_keys, dialect_of, dialect_of_decoder, read_decoder
from mindvlm.models.hf.names import decoder_parts
from mindvlm.nn.config import RopeScaling
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.parameters import fill_parameters
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.weights.config_json import ConfigTable, without_nulls
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import RuleTable

QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1e6}

SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DIALECTS = ("phi", "stablelm", "llama")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_rotation_is_where_transformers_5_puts_it(dialect):
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    before = read_decoder(ConfigTable({**SIZES, **rope}), dialect)
    assert read_decoder(ConfigTable({**SIZES, "rope_parameters": {"rope_type": "default", **rope}}), dialect) == before
    assert before.rope_theta == 500.0
    assert before.rotary_dim == (12 if dialect == "llama" else 6)


@pytest.mark.parametrize(
    ("dialect", "keys", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_parameters.rope_type is 'yarn'"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.type is 'linear'; only 'llama3' is supported",
        ),
        ("llama", {"head_dim": 16}, "head_dim is 16; only 12 is supported"),
        ("llama", {"attention_bias": True}, "attention_bias is true"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is true"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is true"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ],
)
def test_other_forms_are_refused(dialect, keys, named):
    with pytest.raises(UserError, match=named):
        read_decoder(ConfigTable({**SIZES, **keys}), dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_missing_is_named(dialect, key):
    with pytest.raises(UserError, match=f"lacks '{key}'"):
        read_decoder(ConfigTable({name: value for name, value in SIZES.items() if name != key}), dialect)


def test_names_of_a_family_are_unknown_to_the_shared_reader():
    """The family passes its own."""
    table = ConfigTable({"model_type": "tiny_llava"})
    with pytest.raises(UserError, match="model_type is 'tiny_llava', .* expected one of phi, .*qwen2$"):
        dialect_of(table)
    assert dialect_of(table, {"tiny_llava": "llama"}) == "llama"


def test_a_scaling_without_a_type_is_refused():
    with pytest.raises(UserError, match="lacks 'rope_scaling.rope_type'"):
        read_decoder(ConfigTable({**SIZES, "rope_scaling": {"factor": 2.0}}), "llama")


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_llama_3_stretches_the_long_wavelengths(place):
    """The frequencies of transformers, from the file of either major version."""
    theta = {"rope_theta": 500.0}
    inside = theta if place == "rope_parameters" else {}
    described = {**SIZES, **theta, place: {"rope_type": "llama3", **LLAMA_3, **inside}}
    config = read_decoder(ConfigTable(described), "llama")
    assert config.rope_theta == 500.0 and config.rope_scaling == RopeScaling(**LLAMA_3)
    peer = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", **theta, **LLAMA_3})
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](peer, "cpu")
    ours = inverse_frequencies(config.rotary_dim, config.rope_theta, scaling=config.rope_scaling)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    assert scale == 1 and not np.allclose(ours, inverse_frequencies(config.rotary_dim, config.rope_theta))
    reference = scaled_frequencies(reference_frequencies(config.rotary_dim, config.rope_theta), config.rope_scaling)
    np.testing.assert_allclose(reference, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factor": None}, "lacks 'rope_scaling.factor'"),
        ({"factor": "8"}, "rope_scaling.factor is '8', expected a number above 0"),
        ({"original_max_position_embeddings": 0.5}, "rope_scaling.original_max_position_embeddings is 0.5"),
    ],
)
def test_a_wrong_scaling_is_named(changes, named):
    scaling = {key: value for key, value in {**LLAMA_3, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=named):
        read_decoder(ConfigTable({**SIZES, "rope_scaling": {"rope_type": "llama3", **scaling}}), "llama")


@pytest.mark.parametrize("dialect", [*DIALECTS, "qwen2"])
def test_what_is_written_is_read_again(dialect):
    keys = {"num_key_value_heads": 2, "rope_theta": 300.0, "use_qkv_bias": True, "partial_rotary_factor": 0.5}
    scaling = {"rope_scaling": {"rope_type": "llama3", **LLAMA_3}}
    config = read_decoder(ConfigTable({**SIZES, **keys, **scaling}), dialect)
    assert dialect_of_decoder(config) == dialect
    assert read_decoder(ConfigTable(decoder_keys(config)), dialect) == config


@pytest.mark.parametrize("is_tied", [True, False])
def test_qwen2_is_that_of_transformers(is_tied):
    """Logits of a whole pass, through the names of its files."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": is_tied}
    peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, rope_parameters=QWEN2_ROPE)).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    table = ConfigTable(without_nulls(peer.config.to_dict()))
    config = read_decoder(table, dialect_of(table))
    assert config.qkv_bias and config.rope_theta == 1e6 and config.tie_word_embeddings == is_tied
    tensors = {name: value.detach().numpy() for name, value in peer.state_dict().items()}
    table = RuleTable("Hugging Face", "test", decoder_parts("qwen2", is_tied=is_tied))
    source = MemorySource(tensors)
    view = make_plan(table, source.infos).view(source)
    model = CausalLM(config).set_train(False)
    fill_parameters(model, view, prefix="language_model.")
    ids = np.random.default_rng(0).integers(0, 60, (2, 9)).astype(np.int32)
    frequencies = ms.Tensor(inverse_frequencies(config.rotary_dim, config.rope_theta))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    actual = model.lm_head(model(model.embed_tokens(ms.Tensor(ids)), frequencies)).asnumpy()
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids).long()).logits.numpy()
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
