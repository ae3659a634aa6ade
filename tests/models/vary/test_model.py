"""The Vary model as a whole: parameters, splice, gradients, both modes."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor

from mindvlm.checkpoint import MemorySource
from mindvlm.convert.random_weights import RandomSource
from mindvlm.models.registry import convertible_models
from mindvlm.models.vary.config import parse_config
from mindvlm.models.vary.hf_config import from_hf_config
from mindvlm.models.vary.model import VaryModel
from mindvlm.models.vary.model_config import VisionVocabularyConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabulary
from mindvlm.nn.config import VitConfig
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.nn.vit import VisionTransformer
from mindvlm.weights.opened import open_native
from mindvlm.weights.rules.overlaid import OverlaidSource
from tests.models.vary.vary_names import TOY, hf_shapes
from tests.tiny_vary import IMAGE_TOKEN_LEN, VOCAB_SIZE, tiny_config

pytestmark = pytest.mark.usefixtures("pynative")

PAD = VOCAB_SIZE - 1


def build(**changes) -> VaryModel:
    model = VaryModel(parse_config(tiny_config(**changes), Path("tiny.yaml")).model)
    shapes = parameter_shapes(model)
    fill_parameters(model, RandomSource(shapes, 0))
    return model


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pixels(num_images: int) -> tuple[Tensor, Tensor]:
    return Tensor(noise(num_images, 3, 16, 32)), Tensor(noise(num_images, 3, 32, 64, seed=1))


def test_vary_toy_has_the_published_parameters():
    published = hf_shapes(TOY)
    config = from_hf_config(
        {
            "vocab_size": 151860, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
            "kv_channels": 128, "intermediate_size": 11008, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
            "seq_length": 8192, "use_dynamic_ntk": True, "use_logn_attn": True, "max_position_embeddings": 8192,
            "im_patch_token": 151859, "vision_select_layer": -2, "image_token_len": 256,
        }
    )  # fmt: skip
    shapes = parameter_shapes(VaryModel(config))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_237_365_504
    # q, k and v are one tensor in the published file: two more weights and two more biases in each layer
    assert len(published) == 769 and len(shapes) == 769 + 24 * 4


def test_image_features_are_the_two_towers_side_by_side():
    model = build()
    inputs = pixels(2)
    features = model.encode_images(*inputs).asnumpy()
    assert features.shape == (2, IMAGE_TOKEN_LEN, 32)
    clip, vocabulary = model.tower_features(*inputs)
    np.testing.assert_allclose(features[..., :16], model.mm_projector(clip).asnumpy(), atol=1e-6)
    np.testing.assert_allclose(features[..., 16:], model.mm_projector_vary(vocabulary).asnumpy(), atol=1e-6)
    single = model.encode_images(*(Tensor(x.asnumpy()[1:]) for x in inputs)).asnumpy()
    np.testing.assert_allclose(single[0], features[1], atol=1e-5)


def test_the_splice_replaces_placeholders_only():
    model = build()
    span = [PAD] * IMAGE_TOKEN_LEN
    ids = np.array([[1, *span, 2, *span, 3], list(range(19)), [*span, *range(11)]], np.int32)
    features = noise(3, IMAGE_TOKEN_LEN, 32)
    sources = splice_sources(ids, 3, IMAGE_TOKEN_LEN, PAD)
    merged = model.merge(Tensor(ids), Tensor(features), Tensor(sources)).asnumpy()
    expected = model.language_model.embed_tokens.weight.asnumpy()[ids]
    expected[ids == PAD] = features.reshape(-1, 32)
    np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("freeze", [True, False])
def test_gradients_reach_the_towers_unless_they_are_frozen(freeze):
    model = build(model__freeze_vision_tower=freeze).set_train()
    trained = {parameter.name for parameter in model.trainable_params()}
    assert ("vision_tower.pre_layrnorm.weight" in trained) is not freeze
    ids = np.array([[1, *[PAD] * IMAGE_TOKEN_LEN, 2, 3]], np.int32)
    labels = np.array([[-100] * 9 + [2, 3]], np.int32)
    inputs = (
        Tensor(ids), Tensor(labels), Tensor(inverse_frequencies(16, 10000.0)), *pixels(1),
        Tensor(splice_sources(ids, 1, IMAGE_TOKEN_LEN, PAD)),
    )  # fmt: skip
    weights = ms.ParameterTuple(model.get_parameters())
    (loss, num_labels), gradients = ms.value_and_grad(model, None, weights, has_aux=True)(*inputs)
    assert float(num_labels) == 2
    assert np.isfinite(loss.asnumpy())
    norms = {p.name: np.linalg.norm(g.asnumpy()) for p, g in zip(weights, gradients, strict=True)}
    for name in ("mm_projector.weight", "mm_projector_vary.bias", "language_model.embed_tokens.weight"):
        assert norms[name] > 0, name
    for name in ("vision_tower.embeddings.patch_embedding.weight", "vision_vocabulary.patch_embed.proj.weight"):
        assert (norms[name] > 0) is not freeze, name
    if freeze:
        ms.set_context(mode=ms.GRAPH_MODE)
        (graph_loss, _), graph_gradients = ms.value_and_grad(model, None, weights, has_aux=True)(*inputs)
        np.testing.assert_allclose(graph_loss.asnumpy(), loss.asnumpy(), rtol=1e-5)
        for parameter, actual, expected in zip(weights, graph_gradients, gradients, strict=True):
            np.testing.assert_allclose(
                actual.asnumpy(),
                expected.asnumpy(),
                atol=1e-4 * max(norms[parameter.name], 1e-3),
                err_msg=parameter.name,
            )


@pytest.mark.parametrize("select_layer", [-1, -2, 1])
def test_the_clip_tower_equals_transformers(select_layer):
    config = VitConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**{**vars(config), "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5})
    ).eval()
    state = {name.removeprefix("vision_model."): value.numpy() for name, value in theirs.state_dict().items()}
    ours = VisionTransformer(config, select_layer=select_layer)
    fill_parameters(ours, MemorySource(state))
    x = noise(2, 3, 16, 16)
    with torch.no_grad():
        states = theirs(torch.from_numpy(x), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(ours(Tensor(x)).asnumpy(), states[select_layer][:, 1:].numpy(), atol=1e-5)


def test_the_vision_vocabulary_equals_the_sam_of_transformers(tmp_path):
    vision = transformers.SamVisionConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_dim=96, image_size=40, patch_size=8,
        window_size=3, global_attn_indexes=[1], output_channels=12,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.SamModel(transformers.SamConfig(vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in theirs.vision_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    theirs.save_pretrained(tmp_path)
    config = VisionVocabularyConfig(
        embed_dim=24, depth=3, num_heads=2, global_attn_indexes=[1], window_size=3, image_size=40, patch_size=8,
        out_chans=12, net_2_channels=8, net_3_channels=8,
    )  # fmt: skip
    ours = VisionVocabulary(config)
    shapes = parameter_shapes(ours)
    convolutions = {f"vision_vocabulary.net_{n}.weight": noise(*shapes[f"net_{n}.weight"]) for n in (2, 3)}
    with open_native([tmp_path], convertible_models()) as opened:
        weights = OverlaidSource([("SAM", opened.source), ("Vary", MemorySource(convolutions))])
        fill_parameters(ours, weights, prefix="vision_vocabulary.")
    x = noise(2, 3, 40, 40)
    with torch.no_grad():
        neck = theirs.vision_encoder(torch.from_numpy(x)).last_hidden_state.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours.stages(Tensor(x))[config.depth + 1].asnumpy(), neck, atol=2e-5)


def test_parts_can_be_left_out():
    config = parse_config(tiny_config(), Path("tiny.yaml")).model
    config.vision_tower = config.vision_vocabulary = None
    assert all(name.startswith("language_model.") for name in parameter_shapes(VaryModel(config)))
