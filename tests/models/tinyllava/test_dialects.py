"""Each decoder and tower against transformers' own class: tiny random weights, through the production rules."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor, ops

from mindvlm.checkpoint import MemorySource, TensorInfo
from mindvlm.core.config import GenerationConfig
from mindvlm.generation.engine import Engine
from mindvlm.generation.request import Request
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model import TinyLlavaModel, build_model
from mindvlm.nn.attention import GroupedRotarySelfAttention, RotarySelfAttention
from mindvlm.nn.decoder import DecoderLayer, DroppingParallelLayer, ParallelLayer
from mindvlm.nn.norm import LayerNorm, RMSNorm
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.weights.recognise import native_view
from tests.known_models import TINYLLAVA

SIZES = {
    "vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 30, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip
TOWER = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 31,
    "patch_size": 14, "attn_implementation": "eager",
}  # fmt: skip


def phi() -> transformers.PhiForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.7}
    config = transformers.PhiConfig(**SIZES, num_key_value_heads=4, rope_parameters=rope, resid_pdrop=0.0)
    return transformers.PhiForCausalLM(config)


def stablelm() -> transformers.StableLmForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5}
    config = transformers.StableLmConfig(**SIZES, num_key_value_heads=4, rope_parameters=rope, use_qkv_bias=True)
    return transformers.StableLmForCausalLM(config)


def llama() -> transformers.LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 900.0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=rope))


def siglip() -> transformers.SiglipVisionModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))


def clip() -> transformers.CLIPVisionModel:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))


@pytest.fixture(autouse=True)
def same_mode():
    before = ms.get_context("mode")
    yield
    ms.set_context(mode=before)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(peer: torch.nn.Module, *, head_bias: bool = False, **changes) -> TinyLlavaModel:
    """The production model with the peer's weights."""
    config = from_hf_config(peer.config.to_dict())
    if head_bias:
        config.language_model = dataclasses.replace(config.language_model, head_bias=True)
    model = build_model(dataclasses.replace(config, **changes)).set_train(False)
    tensors = {name: value.numpy() for name, value in peer.state_dict().items()}
    if head_bias:
        # the naming that keeps the bias
        tensors = {f"language_model.{name}": value for name, value in tensors.items()}
    expected = {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(model).items()}
    weights = native_view(MemorySource(tensors), TINYLLAVA, target_infos=expected)
    fill_parameters(model, weights)
    return model


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, 60, shape).astype(np.int32)


def assert_close(actual: np.ndarray, expected: torch.Tensor, bound: float = 2e-6) -> None:
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize("make", [phi, stablelm, llama])
def test_logits_are_those_of_transformers(make, mode):
    """Without a cache and, token by token, with one; 35 positions are more than the config names."""
    ms.set_context(mode=mode)
    peer = randomised(make())
    if make is phi:
        torch.nn.init.zeros_(peer.lm_head.bias)
    model = ours(peer)
    ids = random_ids(2, 35)
    expected = peer(torch.from_numpy(ids).long()).logits
    engine = Engine(model, placeholder_id=-200, max_length=64, graph_mode=mode == ms.GRAPH_MODE)

    assert_close(engine.logits(ids).asnumpy(), expected)
    engine.resize(2)
    for row in ids.tolist():
        engine.add(Request(ids=row[:33], options=GenerationConfig(max_new_tokens=3), forced_ids=row[33:]))
    steps = []
    while engine.step():
        steps.append(engine.next_logits.asnumpy())
    assert_close(np.stack(steps, 1), expected[:, 32:])
    assert engine.caches[0].key.shape[1] == getattr(peer.config, "num_key_value_heads", 4)


@pytest.mark.parametrize("make", [phi, stablelm, llama])
def test_gradients_are_those_of_transformers(make):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    peer = randomised(make())
    if make is phi:
        torch.nn.init.zeros_(peer.lm_head.bias)
    model = ours(peer).set_train(True)
    lm = model.language_model
    ids = random_ids(2, 12)
    ids[0, 5] = 3  # the padding token, whose embedding does not learn
    labels = np.where(np.arange(12) < 4, -100, ids).astype(np.int32)
    inv_freq = Tensor(inverse_frequencies(lm.config.rotary_dim, lm.config.rope_theta))

    def loss(input_ids, labels, inv_freq):
        total, count = model.text_loss(model.embed(input_ids), labels, inv_freq)
        return total / count

    parameters = ms.ParameterTuple(lm.trainable_params())
    value, gradients = ops.value_and_grad(loss, None, parameters)(Tensor(ids), Tensor(labels), inv_freq)
    expected = peer(torch.from_numpy(ids).long(), labels=torch.from_numpy(labels).long()).loss
    expected.backward()
    assert_close(value.asnumpy(), expected)
    by_name = {parameter.name: gradient.asnumpy() for parameter, gradient in zip(parameters, gradients, strict=True)}
    table = native_view(
        MemorySource({name: value.numpy() for name, value in peer.state_dict().items()}), TINYLLAVA
    ).plan
    for name, parameter in peer.named_parameters():
        if name != "lm_head.bias":
            (target,) = table.targets_of(name)
            assert_close(by_name[target], parameter.grad, 1e-4 if "k_proj.bias" in name else 2e-5)
    assert not by_name["language_model.embed_tokens.weight"][3].any()


def test_the_bias_of_the_published_phi_head():
    """TinyLLaVA Factory keeps it: logits and the gradient of the bias."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    peer = randomised(phi())
    model = ours(peer, head_bias=True)
    ids = random_ids(1, 9)
    engine = Engine(model, placeholder_id=-200, max_length=64, graph_mode=False)
    result = peer(torch.from_numpy(ids).long(), labels=torch.from_numpy(ids).long())
    assert_close(engine.logits(ids).asnumpy(), result.logits)
    result.loss.backward()
    bias = model.language_model.lm_head.bias
    inv_freq = engine.frequencies(1)
    gradient = ops.grad(lambda x: model.text_loss(model.embed(x), x, inv_freq)[0], None, ms.ParameterTuple([bias]))
    assert_close(gradient(Tensor(ids))[0].asnumpy() / 8, peer.lm_head.bias.grad, 1e-5)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_siglip_is_the_state_before_the_last_layer(mode):
    ms.set_context(mode=mode)
    peer = randomised(siglip())
    pixels = torch.randn(2, 3, 31, 31)
    expected = peer(pixels, output_hidden_states=True).hidden_states[-2]
    state = peer.state_dict()
    last = {name for name in state if "layers.2." in name}
    peer.state_dict = lambda: {name: value for name, value in state.items() if name not in last}
    model = ours(peer)
    # 31 pixels hold 2 x 2 patches and a rest
    assert model.config.image_token_len == 4
    assert_close(model.vision_tower(Tensor(pixels.numpy())).asnumpy(), expected)


@pytest.mark.parametrize(("dropped", "first"), [(1, 1), (0, 0)])
def test_clip_with_and_without_its_class_token(dropped, first):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    peer = randomised(clip())
    pixels = torch.randn(2, 3, 31, 31)
    expected = peer(pixels, output_hidden_states=True).hidden_states[-2][:, first:]
    model = ours(peer, num_dropped_tokens=dropped, image_token_len=5 - dropped)
    assert_close(model.vision_tower(Tensor(pixels.numpy())).asnumpy(), expected)


def test_a_dialect_is_a_choice_of_cells():
    for make, kinds in (
        (phi, (ParallelLayer, LayerNorm, RotarySelfAttention)),
        (stablelm, (DecoderLayer, LayerNorm, RotarySelfAttention)),
        (llama, (DecoderLayer, RMSNorm, GroupedRotarySelfAttention)),
    ):
        lm = build_model(from_hf_config(make().config.to_dict())).language_model
        assert (type(lm.layers[1]), type(lm.norm), type(lm.layers[0].self_attn)) == kinds
    dropping = {**phi().config.to_dict(), "resid_pdrop": 0.1}
    layers = build_model(from_hf_config(dropping)).language_model.layers
    assert [type(layer) for layer in layers] == [DroppingParallelLayer] * 2
