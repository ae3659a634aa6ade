"""What a language model's config.json may ask for, and what is refused rather than computed wrongly."""

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import decoder_config

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
    before = decoder_config({**SIZES, **rope}, dialect)
    assert decoder_config({**SIZES, "rope_parameters": {"rope_type": "default", **rope}}, dialect) == before
    assert before.rope_theta == 500.0
    assert before.rotary_dim == (12 if dialect == "llama" else 6)


@pytest.mark.parametrize(
    ("dialect", "keys", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is 'llama3'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is "),
        ("llama", {"head_dim": 16}, "head_dim is 16; only 12 is supported"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_other_forms_are_refused(dialect, keys, named):
    with pytest.raises(UserError, match=named):
        decoder_config({**SIZES, **keys}, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_missing_is_named(dialect, key):
    with pytest.raises(UserError, match=f"lacks '{key}'"):
        decoder_config({name: value for name, value in SIZES.items() if name != key}, dialect)
