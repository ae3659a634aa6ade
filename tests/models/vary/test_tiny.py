"""Vary-tiny: its parts, gradients, configs, and that it loads, answers and talks."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindvlm.api import load
from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.convert.random_weights import random_tensor
from mindvlm.convert.reference.vary_tiny import ReferenceVaryTiny
from mindvlm.core.errors import UserError
from mindvlm.models.vary.config import parse_config
from mindvlm.models.vary.hf_config import ImageTokens, from_hf_config, vary_tiny_config
from mindvlm.models.vary.model import VaryTinyModel, build_model
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.splice import splice_sources
from mindvlm.sessions.conversation import Conversation
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import MODELS
from tests.tiny_vary import (
    IMAGE_TOKEN_LEN,
    TINY_OPT_CHANGES,
    picture,
    tiny_config,
    tiny_opt_config,
    tiny_weights,
    write_tiny_opt,
)

VOCAB_SIZE = TINY_OPT_CHANGES["model__language_model"]["vocab_size"]
PAD = VOCAB_SIZE - 3
LM = "model__language_model__"


@pytest.fixture(autouse=True)
def same_mode():
    mode = ms.get_context("mode")
    yield
    ms.set_context(mode=mode)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(write_tiny_opt(tmp_path_factory.mktemp("tiny_opt")), weights="float32")


def build(**changes) -> VaryTinyModel:
    config = tiny_opt_config(**changes)
    model, weights = build_model(parse_config(config, Path("tiny.yaml")).model), tiny_weights(config)
    fill_parameters(model, MemorySource(weights))
    return model


def reference(model: VaryTinyModel) -> ReferenceVaryTiny:
    """The torch reference with the model's weights, through the conversion rules."""
    source = MemorySource({name: p.asnumpy() for name, p in model.parameters_and_names()})
    view = make_plan(MODELS["vary_tiny"].hf.reverse(), source.infos).view(source)
    state = {name: torch.from_numpy(view.read(name).to_float32().copy()) for name in view.infos}
    peer = ReferenceVaryTiny.from_state(model.config, state, device="cpu")
    peer.image_tokens = ImageTokens(patch=PAD, start=PAD + 1, end=PAD + 2)
    return peer


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and labels (2, 20) of a row with a picture and one without, and the picture's pixels."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, PAD, (2, 20)).astype(np.int32)
    ids[0, 1 : IMAGE_TOKEN_LEN + 3] = [PAD + 1, *[PAD] * IMAGE_TOKEN_LEN, PAD + 2]
    labels = ids.copy()
    labels[0, : IMAGE_TOKEN_LEN + 3] = -100
    return ids, labels, rng.standard_normal((1, 3, 32, 64)).astype(np.float32)


def tensors(ids, labels, high) -> tuple[Tensor, ...]:
    sources = splice_sources(ids, 1, IMAGE_TOKEN_LEN, PAD)
    return Tensor(ids), Tensor(labels), Tensor(np.zeros(8, np.float32)), Tensor(high), Tensor(sources)


def test_the_released_model_has_its_parameters():
    shapes = parameter_shapes(build_model(from_hf_config(vary_tiny_config())))
    assert {name: info.shape for name, info in MODELS["vary_tiny"].released_infos().items()} == shapes
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())) == (377, 223_165_440)


def test_a_tied_head_has_no_parameter_and_names_stay():
    model = build()
    names = [name for name, _ in model.parameters_and_names()]
    assert names == [parameter.name for parameter in model.get_parameters()]
    assert len(set(names)) == len(names) and not any("lm_head" in name for name in names)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_loss_and_a_training_step_are_those_of_torch(mode):
    ms.set_context(mode=mode)
    model = build()
    peer = reference(model).train()
    ids, labels, high = batch()
    output = peer(torch.from_numpy(ids).long(), [torch.from_numpy(high), None], labels=torch.from_numpy(labels))
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.0)
    output.loss.backward()
    optimizer.step()
    options = OptimizerConfig(learning_rate=1e-2, eps=1e-5, max_grad_norm=1e9)
    step = TrainStep(model.set_train(True), options)
    loss, *_ = step(Tensor(1e-2, ms.float32), *tensors(ids, labels, high))
    np.testing.assert_allclose(loss.asnumpy(), output.loss.item(), rtol=1e-6)
    expected = {name: value.detach().numpy() for name, value in peer.state_dict().items()}
    source = MemorySource({name: p.asnumpy() for name, p in model.parameters_and_names()})
    view = make_plan(MODELS["vary_tiny"].hf.reverse(), source.infos).view(source)
    for name, array in expected.items():
        np.testing.assert_allclose(view.read(name).to_float32(), array, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_the_tower_unless_it_is_frozen(frozen):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = build(model__freeze_vision_tower=frozen)
    before = {name: p.asnumpy().copy() for name, p in model.parameters_and_names()}
    step = TrainStep(model.set_train(True), OptimizerConfig(learning_rate=1e-2))
    step(Tensor(1e-2, ms.float32), *tensors(*batch()))
    moved = {name for name, p in model.parameters_and_names() if not np.array_equal(p.asnumpy(), before[name])}
    tower = {name for name in before if name.startswith("vision_vocabulary.")}
    # the bias of a key cancels in the softmax
    assert moved & tower == (set() if frozen else tower)
    assert "language_model.embed_tokens.weight" in moved and "mm_projector.weight" in moved


def test_positions_of_padding_may_pass_the_end_of_the_table():
    model = build(**{"model__max_length": 24, LM + "max_position_embeddings": 24})
    ids = np.arange(4, 24, dtype=np.int32)[None]
    lm = model.language_model
    plain = lm(lm.embed_tokens(Tensor(ids)), None).asnumpy()
    longer = lm(lm.embed_tokens(Tensor(np.pad(ids, ((0, 0), (0, 44))))), None).asnumpy()
    np.testing.assert_allclose(longer[:, :20], plain, atol=1e-5)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_a_batch_answers_as_its_rows_alone(tmp_path, mode):
    model = load(write_tiny_opt(tmp_path), mode=mode)
    queries, pictures = ["the page", "a much longer question about it", "no picture"], [picture(0), picture(1), None]
    options = {"max_new_tokens": 6}
    together = model.generate(queries, pictures, **options)
    alone = [model.chat(query, image, **options) for query, image in zip(queries, pictures, strict=True)]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({tuple(answer.ids) for answer in alone}) > 1


def test_logits_are_those_of_the_torch_reference(loaded):
    peer = reference(loaded.model)
    prompt, pixels = loaded.processor.prompt("the page", num_images=1), loaded.processor.pixels(picture())
    assert list(vars(pixels)) == ["high"] and pixels.high.shape == (3, 32, 64)
    ids, pixels = torch.tensor([prompt.input_ids]), torch.from_numpy(pixels.high[None])
    with torch.no_grad():
        expected = peer(ids, [pixels]).logits[0].numpy()
    actual = loaded.logits("the page", picture())
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
    answer = loaded.chat("the page", picture(), max_new_tokens=6)
    again = peer.generate(ids, [pixels], max_new_tokens=6).ids[0].tolist()
    assert answer.ids == again[: len(answer.ids)]


def test_a_conversation_continues_its_cache(loaded):
    conversation = Conversation(loaded)
    conversation.ask("the page", picture(), max_new_tokens=4)
    second = conversation.ask("and more", max_new_tokens=4)
    ids = np.array([conversation.ids], np.int32)
    uncached = loaded.engine.logits(ids, loaded.encode_images(picture())).asnumpy()[0].argmax(-1)
    assert uncached[-len(second.ids) - 1 : -1].tolist() == second.ids


def test_answers_stop_at_the_end_token(loaded):
    assert loaded.processor.stop_ids == (2,) and loaded.processor.stop_strings == ("</s>",)


def test_the_caption_template_shows_the_picture_and_asks_nothing(tmp_path):
    model = load(write_tiny_opt(tmp_path, processor__template="opt"))
    prompt = model.processor.prompt("whatever", num_images=1)
    assert prompt.input_ids == [2, PAD + 1, *[PAD] * IMAGE_TOKEN_LEN, PAD + 2]
    assert prompt.text == "<img>" + "<imgpad>" * IMAGE_TOKEN_LEN + "</img>"
    assert model.chat("", picture(), max_new_tokens=3).num_prompt_tokens == len(prompt.input_ids)
    with pytest.raises(UserError, match="template 'opt' needs a picture"):
        model.chat("a question")


def test_both_namings_of_the_original_load(tmp_path):
    config = tiny_opt_config()
    weights = tiny_weights(config)
    native = load(write_tiny_opt(tmp_path / "native", weights=weights))
    source = MemorySource(weights)
    view = make_plan(MODELS["vary_tiny"].hf.reverse(), source.infos).view(source)
    published = {name: view.read(name).to_float32() for name in view.infos}
    other = {name.replace("vision_tower_2.", "vision_tower."): value for name, value in published.items()}
    for folder, tensors in (("published", published), ("other", other)):
        path = write_tiny_opt(tmp_path / folder)
        write_checkpoint(tmp_path / folder / "tiny_opt.safetensors", MemorySource(tensors))
        np.testing.assert_array_equal(load(path).logits("x", picture()), native.logits("x", picture()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__image_token_len": 7}, "model.image_token_len is 7 but the vision vocabulary outputs 8"),
        ({"model__max_length": 321}, "model.max_length is 321 but .*max_position_embeddings is 320"),
        ({LM + "max_position_embeddings": None}, "max_position_embeddings is None; learned positions need"),
        ({LM + "hidden_act": "tanh"}, "model.language_model.hidden_act is 'tanh'; expected one of gelu"),
        ({LM + "norm": "batch_norm"}, "language_model.norm' is 'batch_norm'; expected 'rms_norm' or 'layer_norm'"),
        ({LM + "position": "alibi"}, "language_model.position' is 'alibi'"),
        (
            {"processor__clip": {"size": 8, "resize": "crop"}},
            "processor.clip is set but there is no model.vision_tower",
        ),
        ({"processor__high": None}, "processor.high"),
    ],
)
def test_an_impossible_config(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config(tiny_opt_config(**changes), Path("tiny.yaml"))


def test_vary_toy_needs_a_clip_picture():
    with pytest.raises(UserError, match="processor.clip is null but there is a model.vision_tower"):
        parse_config(tiny_config(processor__clip=None), Path("tiny.yaml"))


@pytest.mark.parametrize("key", ["do_layer_norm_before", "enable_bias", "tie_word_embeddings"])
def test_an_opt_of_another_form_is_refused(key):
    with pytest.raises(UserError, match=f"{key} is false"):
        from_hf_config(vary_tiny_config() | {key: False})
    with pytest.raises(UserError, match="word_embed_proj_dim is 512"):
        from_hf_config(vary_tiny_config() | {"word_embed_proj_dim": 512})


def test_an_opt_without_pictures_is_a_decoder_alone():
    plain = {key: value for key, value in vary_tiny_config().items() if not key.startswith(("im", "vision", "arch"))}
    config = from_hf_config(plain | {"model_type": "opt", "num_hidden_layers": 1})
    assert config.vision_vocabulary is None and not config.is_tiny
    names = parameter_shapes(build_model(config))
    assert all(name.startswith("language_model.") for name in names)
    assert random_tensor("x", (2,), 0).shape == (2,)
