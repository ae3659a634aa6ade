"""The decoder in OPT's dialect against transformers, and its Cells."""

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor

from mindvlm.checkpoint import MemorySource
from mindvlm.nn.attention import RotarySelfAttention, SelfAttention
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.linear import Embedding, TiedHead
from mindvlm.nn.mlp import GatedMLP, PlainMLP
from mindvlm.nn.norm import LayerNorm, RMSNorm
from mindvlm.nn.parameters import fill_parameters
from mindvlm.nn.positions import LearnedPositions, RotaryPositions
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import MODELS

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 8,
    "intermediate_size": 40,
}
OPT = {
    "norm": "layer_norm",
    "position": "learned",
    "max_position_embeddings": 30,
    "mlp": "plain",
    "hidden_act": "relu",
    "o_bias": True,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def same_mode():
    before = ms.get_context("mode")
    yield
    ms.set_context(mode=before)


@pytest.fixture(scope="module")
def peer() -> transformers.OPTForCausalLM:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=40, word_embed_proj_dim=24,
        max_position_embeddings=30, pad_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def opt(peer) -> CausalLM:
    """The decoder with the peer's weights through the production rules."""
    model = CausalLM(DecoderConfig(**SIZES, **OPT))
    source = MemorySource({name: value.numpy() for name, value in peer.state_dict().items()})
    weights = make_plan(MODELS["vary_tiny"].hf, source.infos, partial=True).view(source)
    fill_parameters(model, weights, prefix="language_model.")
    return model


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_logits_are_those_of_transformers(opt, peer, mode):
    ms.set_context(mode=mode)
    ids = np.random.default_rng(0).integers(0, 60, (3, 17)).astype(np.int32)
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids).long()).logits.numpy()
    hidden = opt(opt.embed_tokens(Tensor(ids)), Tensor(np.zeros(4, np.float32)))
    actual = opt.lm_head(hidden).asnumpy()
    assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


def test_a_dialect_is_a_choice_of_cells():
    qwen, opt = (CausalLM(DecoderConfig(**SIZES, **dialect)) for dialect in ({}, OPT))
    expected = {
        qwen: (RotaryPositions, RMSNorm, RMSNorm, RotarySelfAttention, GatedMLP),
        opt: (LearnedPositions, LayerNorm, LayerNorm, SelfAttention, PlainMLP),
    }
    for lm, kinds in expected.items():
        layer = lm.layers[0]
        cells = (lm.embed_positions, lm.norm, layer.post_attention_layernorm, layer.self_attn, layer.mlp)
        assert tuple(map(type, cells)) == kinds
    assert isinstance(opt.lm_head, TiedHead)
    names = [name for name, _ in opt.parameters_and_names()]
    assert [name for name, _ in qwen.parameters_and_names()][-1] == "lm_head.weight"
    assert names[:2] == ["embed_tokens.weight", "embed_positions.weight"] and names[-1] == "norm.bias"
    assert "layers.1.self_attn.o_proj.bias" in names


def test_learned_positions_take_the_row_two_behind():
    cell = LearnedPositions(DecoderConfig(**SIZES, **OPT))
    table = np.arange(32 * 24, dtype=np.float32).reshape(32, 24)
    cell.weight.set_data(Tensor(table))
    positions = np.array([[0, 1, 29], [5, 0, 64]], np.int32)
    out = cell(Tensor(np.ones((2, 3, 24), np.float32)), Tensor(positions)).asnumpy()
    # beyond the table there is padding only
    np.testing.assert_array_equal(out, 1 + table[np.minimum(positions, 29) + 2])


def test_learned_positions_have_no_rotary_extensions():
    config = DecoderConfig(**SIZES, **OPT)
    assert not config.use_dynamic_ntk and not config.use_logn_attn
    assert DecoderConfig(**SIZES).use_dynamic_ntk


def test_the_tied_head_is_the_table():
    embedding = Embedding(7, 3)
    embedding.weight.set_data(Tensor(np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)))
    x = np.random.default_rng(1).standard_normal((2, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(TiedHead(embedding)(Tensor(x)).asnumpy(), x @ embedding.weight.asnumpy().T, atol=1e-6)
