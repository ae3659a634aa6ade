"""The listed shapes are those of the Cells that are built from the same config."""

import pytest

from mindvlm.nn.config import ACTIVATIONS, DecoderConfig, VitConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.mlp import ACTIVATIONS as CELLS
from mindvlm.nn.parameters import parameter_shapes
from mindvlm.nn.resampler import Resampler
from mindvlm.nn.shapes import decoder_shapes, resampler_shapes, vit_shapes
from mindvlm.nn.vit import TOWERS

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6}
PHI = {"norm": "layer_norm", "residual": "parallel", "mlp": "plain", "o_bias": True, "partial_rotary_factor": 0.5}
DECODERS = {
    "qwen": {},
    "opt": {"norm": "layer_norm", "position": "learned", "max_position_embeddings": 21, "mlp": "plain", "o_bias": True}
    | {"tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2, "qkv_bias": False},
    "phi": PHI,
    "phi with dropout": PHI | {"residual_dropout": 0.1},
    "phi with head bias": PHI | {"head_bias": True},
    "stablelm": {"norm": "layer_norm", "partial_rotary_factor": 0.5},
    "stablelm without biases": {"norm": "layer_norm", "qkv_bias": False},
    "internlm": {"o_bias": True},
    "vit": {"norm": "layer_norm", "mlp": "plain", "mlp_bias": False, "o_bias": True},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "tied qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("dialect", DECODERS)
def test_decoders(dialect):
    config = DecoderConfig(**SIZES, intermediate_size=40, **DECODERS[dialect])
    assert decoder_shapes(config) == parameter_shapes(CausalLM(config))


@pytest.mark.parametrize("dialect", TOWERS)
@pytest.mark.parametrize("image_size", [29, [14, 30]])
def test_towers(dialect, image_size):
    config = VitConfig(
        dialect=dialect,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=7,
    )
    assert vit_shapes(config) == parameter_shapes(TOWERS[dialect](config))


def test_resampler():
    sizes = {"width": 24, "out_width": 20, "num_queries": 5, "num_layers": 2}
    assert resampler_shapes(18, **sizes) == parameter_shapes(Resampler(18, num_heads=12, **sizes))


def test_every_activation_has_a_cell():
    assert set(ACTIVATIONS) == CELLS.keys()
