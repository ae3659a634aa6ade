"""The listed shapes of a whole model are those of the Cell that is built from the same config."""

import math

import pytest

from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.model_config import DelvmModelConfig, VqganConfig
from mindvlm.models.delvm.model_config import model_shapes as delvm_shapes
from mindvlm.models.slime.model import SlimeModel
from mindvlm.models.slime.model_config import RouterConfig, SlimeModelConfig
from mindvlm.models.slime.model_config import model_shapes as slime_shapes
from mindvlm.models.tinyllava import model as tinyllava
from mindvlm.models.tinyllava.model_config import ConnectorConfig, TinyLlavaModelConfig
from mindvlm.models.tinyllava.model_config import model_shapes as tinyllava_shapes
from mindvlm.models.vary import model as vary
from mindvlm.models.vary.model_config import VaryModelConfig, VisionVocabularyConfig
from mindvlm.models.vary.model_config import model_shapes as vary_shapes
from mindvlm.nn.config import DecoderConfig, VitConfig
from mindvlm.nn.parameters import parameter_shapes

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"vocab_size": 50, **SIZES, "head_dim": 8}
TOWER = VitConfig(**SIZES, image_size=[14, 28], patch_size=7)
VOCABULARY = {"embed_dim": 12, "depth": 3, "num_heads": 2, "global_attn_indexes": [1], "image_size": [32, 64]}
VOCABULARY |= {"patch_size": 4, "out_chans": 6, "net_2_channels": 8, "net_3_channels": 10}


@pytest.mark.parametrize("window_size", [0, 3])
@pytest.mark.parametrize("tower", [TOWER, None])
@pytest.mark.parametrize("decoder", [{}, None])
def test_vary(window_size, tower, decoder):
    tiny = {"position": "learned", "max_position_embeddings": 64, "tie_word_embeddings": True} if tower is None else {}
    config = VaryModelConfig(
        language_model=None if decoder is None else DecoderConfig(**DECODER, **tiny),
        vision_tower=tower,
        vision_vocabulary=VisionVocabularyConfig(**VOCABULARY, window_size=window_size),
        image_token_len=8,
        max_length=64,
    )
    assert vary_shapes(config) == parameter_shapes(vary.build_model(config))


@pytest.mark.parametrize("connector", ["linear", "mlp1x_gelu", "mlp3x_gelu", "resampler", "identity"])
@pytest.mark.parametrize("tower", [TOWER, None])
@pytest.mark.parametrize("decoder", [DecoderConfig(**DECODER, num_key_value_heads=2), None])
def test_tinyllava(connector, tower, decoder):
    connector = ConnectorConfig(type=connector, resampler_hidden_size=24, num_queries=5, num_resampler_layers=2)
    config = TinyLlavaModelConfig(
        language_model=decoder,
        vision_tower=tower,
        connector=connector,
        image_token_len=connector.num_tokens(TOWER.num_tokens),
        image_newline=decoder is not None,
    )
    assert tinyllava_shapes(config) == parameter_shapes(tinyllava.build_model(config))


@pytest.mark.parametrize("gate", ["learned", "mlp", "resampler"])
def test_slime(gate):
    tower = VitConfig(**SIZES | {"hidden_size": 128}, image_size=28, patch_size=7)
    config = SlimeModelConfig(
        language_model=DecoderConfig(**DECODER, num_key_value_heads=2),
        vision_tower=tower,
        num_local_tokens=4,
        gate=gate,
        separator_id=3,
        router=RouterConfig(),
    )
    assert slime_shapes(config) == parameter_shapes(SlimeModel(config))


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("input_embedding", ["table", "codebook"])
def test_delvm(input_embedding, attention):
    changes = {"attn_resolutions": [8], "no_attn_mid_block": False, "resample_with_conv": False} if attention else {}
    sizes = {"hidden_channels": 32, "channel_mult": [1, 2, 1], "num_res_blocks": 2, "z_channels": 6}
    vqgan = VqganConfig(resolution=16, num_embeddings=50, quantized_embed_dim=4, **sizes, **changes)
    decoder = DecoderConfig(**DECODER, o_bias=True)
    config = DelvmModelConfig(language_model=decoder, vqgan=vqgan, input_embedding=input_embedding)
    assert delvm_shapes(config) == parameter_shapes(DelvmModel(config))


def test_the_published_delvm_has_the_published_number_of_parameters():
    assert sum(map(math.prod, delvm_shapes(DelvmModelConfig(vqgan=VqganConfig())).values())) == 146_244_675
