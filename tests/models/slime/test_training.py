"""Training batches of a SliME: the router in the graph keeps the rows that it keeps when asking."""

import json
from dataclasses import replace
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from PIL import Image

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.models.own_training import text_inputs
from mindvlm.models.slime.model import SlimeModel
from mindvlm.models.slime.router import kept_rows
from mindvlm.nn.dropout import dropout_counter
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.training.datasets.config import DatasetsConfig, make_collator, sample_options
from mindvlm.training.datasets.samples import Sample, SampleMaker
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.training.step_runner import model_arguments
from mindvlm.training.trainable import choose_trainable
from tests.models.tinyllava.test_tiles_training import loss_and_gradients, record
from tests.tiny_slime import write_tiny_slime

SIZES = {"wide": (150, 60), "tall": (40, 160), "square": (50, 50)}
RECORDS = [
    (["wide"], ["<image>\nWhat?", "the red cup", "Is it red?", "yes"]),
    ([], ["How many?", "7"]),
    (["tall", "square"], ["<image> or <image>?", "the cup"]),
    (["square"], ["What? <image>", "a cup"]),
]
ONE_PICTURE = [one for one in RECORDS if len(one[0]) < 2]
# softmax does not see it, so that its gradient is rounding
UNSEEN = "attn.k_proj.bias"
LONG = {"max_position_embeddings": 512}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens model, samples and collator of a config.json with changed keys."""

    # gradients do not pass through the host
    monkeypatch.setattr("mindvlm.nn.rows.works_on_host", lambda: False)

    def run(*, original: bool = False, records=RECORDS, data=None, **changes):
        model = mindvlm.load(write_tiny_slime(tmp_path, **{**LONG, **changes}), mode="pynative", weights="float32")
        model.config.processor.original_parse = original
        for seed, (name, size) in enumerate(SIZES.items()):
            noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / f"{name}.png")
        (tmp_path / "data.json").write_text(json.dumps([record(*one) for one in records]))
        (tmp_path / "registry.yaml").write_text("mix: {images: ., annotations: data.json}\n")
        registry = str(tmp_path / "registry.yaml")
        config = DatasetsConfig(registry=registry, datasets="mix", batch_size=4, num_workers=0, **(data or {}))
        options = sample_options(config, partial(type(model.processor), model.config.processor), seed=0, shuffle=False)
        maker = SampleMaker(options)
        return model, maker, make_collator(config, maker.processor)

    return run


def arguments(model, batch) -> tuple[Tensor, ...]:
    decoder = model.config.model.language_model
    frequencies = Tensor(inverse_frequencies(decoder.rotary_dim, decoder.rope_theta))
    pixels = tuple(batch.pixels.values())
    inputs = text_inputs(batch.input_ids, batch.labels, batch.sources, pixels, 0, [], batch.choices)
    return model_arguments(inputs, frequencies, ms.float32)


def asked_loss(model, samples: list[Sample], frequencies: Tensor, *, sees_answers: bool):
    """The summed loss of samples whose pictures pass the path of questions, one sample at a time."""
    cell, placeholder, total, count = model.model, model.engine.placeholder_id, 0, 0
    for sample in samples:
        ids, labels = sample.input_ids, sample.labels
        is_text = ids != placeholder
        if not sees_answers:
            is_text &= np.arange(len(ids)) < np.argmax(labels != -100)
        text = ids[is_text].tolist()
        rows = []
        for one in sample.pictures:
            views = [cell.encode_images(Tensor(next(iter(vars(view).values()))[None])) for view in one.views]
            rows.append(cell.picture_rows(ops.concat(views, 0), one.layout, text))
        repeats, starts = np.where(ids == placeholder, 0, 1), np.flatnonzero(ids == placeholder)
        lengths = [len(one.layout) for one in sample.pictures]
        repeats[starts[np.cumsum([0, *lengths])[:-1]]] = [len(one) for one in rows]
        ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
        features = ops.concat(rows, 0) if rows else ops.zeros((0, 32), ms.float32)
        sources = splice_sources(ids[None], len(features), 1, placeholder)
        embeds = cell.merge(Tensor(ids[None]), features, Tensor(sources))
        length = cell.config.max_length
        loss, number = cell.text_loss(embeds[:, :length], Tensor(labels[None, :length]), frequencies)
        total, count = total + loss, count + number
    return total, count


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"mm_resampler_topp": 0.0, "mm_patch_merge_type": "flat"}, {}),
        ({"mm_resampler_topp": 1.0}, {}),
        ({"use_local_only": True}, {}),
        ({"use_global_only": True, "mm_learnable_gated": 1}, {}),
        ({"image_aspect_ratio": "pad"}, {}),
        ({}, {"original": True, "max_length": 163}),
        ({"use_global_only": True}, {"original": True, "max_length": 150}),
    ],
)
def test_the_loss_and_gradients_are_those_of_the_rows_when_asking(opened, changes, options):
    options = dict(options)
    max_length = options.pop("max_length", None)
    original = options.get("original", False)
    records = ONE_PICTURE if original else RECORDS
    model, maker, collate = opened(**options, records=records, **changes)
    config = model.model.config
    if max_length:
        config.max_length = max_length
    samples = [maker.make(number) for number in range(len(records))]
    batch = collate(samples)
    assert (batch.choices is None) == (config.use == "global")
    model.model.set_train()
    inputs = arguments(model, batch)
    loss, gradients = loss_and_gradients(model, lambda: model.model(*inputs))
    asked = partial(asked_loss, model, samples, inputs[2], sees_answers=True)
    expected, of_rows = loss_and_gradients(model, asked)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, array in of_rows.items():
        if name.endswith(UNSEEN):
            continue
        assert np.linalg.norm(gradients[name] - array) <= 1e-4 * np.linalg.norm(array), name
    assert any(array.any() for name, array in of_rows.items() if "projection" in name)


def test_views_have_slots_by_kind(opened):
    _, maker, collate = opened(data={"image_slots": [5, 6]})
    batch = collate([maker.make(number) for number in range(4)])
    # 4 pictures with 4, 4, 2 and 2 crops, in buckets of two
    assert batch.pixels["image"].shape[0] == 5 and batch.pixels["crops"].shape[:2] == (6, 2)
    alone = collate([maker.make(1)])
    assert alone.pixels["image"].shape[0] == 5 and not alone.pixels["crops"].any() and not alone.pixels["image"].any()
    assert alone.choices.shape == (1, 2, alone.input_ids.shape[1]) and not alone.choices[:, 1].any()
    assert batch.choices.shape[1] == 3, "the text and two pictures"


def test_a_batch_of_text_alone_has_the_loss_of_its_text(opened):
    model, maker, collate = opened(records=[RECORDS[1]])
    sample = maker.make(0)
    model.model.set_train()
    inputs = arguments(model, collate([sample]))
    expected, _ = asked_loss(model, [sample], inputs[2], sees_answers=True)
    np.testing.assert_allclose(model.model(*inputs)[0].asnumpy(), expected.asnumpy(), rtol=1e-6)


@pytest.mark.parametrize("slots", [0, [0, 3]])
def test_batches_without_a_picture_have_a_slot(opened, slots):
    _, maker, collate = opened(records=[RECORDS[1]], data={"image_slots": slots})
    pixels = collate([maker.make(0)]).pixels
    assert [len(array) for array in pixels.values()] == [1, 3 if slots else 1]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_pictures_train(opened, tmp_path, size):
    model, maker, collate = opened(records=[RECORDS[0]])
    Image.new("RGB", size, "red").save(tmp_path / "wide.png")
    sample = maker.make(0)
    model.model.set_train()
    inputs = arguments(model, collate([sample]))
    expected, _ = asked_loss(model, [sample], inputs[2], sees_answers=True)
    np.testing.assert_allclose(model.model(*inputs)[0].asnumpy(), expected.asnumpy(), rtol=1e-6)


def test_the_router_may_see_the_answers_or_not(opened):
    records = [(["wide"], ["<image>\nWhat?", "the red cup " * 12, "Is it red?", "yes"])]
    model, maker, collate = opened(records=records, mm_resampler_topp=0.3, mm_resampler_temp=0.5)
    sample, losses = maker.make(0), []
    model.model.set_train()
    inputs = arguments(model, collate([sample]))
    for sees_answers in (True, False):
        model.model.config.router.sees_answers = sees_answers
        expected, _ = asked_loss(model, [sample], inputs[2], sees_answers=sees_answers)
        losses.append(model.model(*inputs)[0].asnumpy())
        np.testing.assert_allclose(losses[-1], expected.asnumpy(), rtol=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3, "other rows are kept"


def test_left_out_rows_move_behind_the_sequence(opened):
    model, maker, collate = opened(mm_resampler_topp=0.3)
    samples = [maker.make(number) for number in (0, 1)]
    batch = collate(samples)
    ids, labels, _, *images = arguments(model, batch)
    _, routed = model.model.inputs(ids, labels, *images)
    for row, sample in zip(routed.asnumpy(), samples, strict=True):
        num_kept = len(sample.labels)
        if sample.pictures:
            (picture,) = sample.pictures
            views = [model.model.encode_images(Tensor(next(iter(vars(view).values()))[None])) for view in picture.views]
            rows = super(type(model.model), model.model).picture_rows(ops.concat(views, 0), picture.layout, ())
            text = sample.input_ids[sample.input_ids != model.engine.placeholder_id].tolist()
            scores = model.model.scores(rows[picture.num_fixed :], text)
            num_dropped = len(scores) - len(kept_rows(scores, model.model.config.router))
            assert num_dropped > 0
            num_kept -= num_dropped
        learned = sample.labels[sample.labels != -100].tolist()
        assert row[row != -100].tolist() == learned and (row[num_kept:] == -100).all()
        assert row[num_kept - 1] == learned[-1]


def test_turns_that_do_not_fit_are_left_out_by_the_rows_before_the_choice(opened):
    _, maker, _ = opened(records=[RECORDS[0]])
    whole = maker.make(0)
    shorter = SampleMaker(replace(maker.options, max_length=len(whole.input_ids) - 1)).make(0)
    assert len(shorter.input_ids) < len(whole.input_ids) and len(shorter.pictures) == 1


def stepped(model, weights: dict[str, np.ndarray], inputs: tuple[Tensor, ...], **settings) -> dict[str, np.ndarray]:
    """Losses and weights after two steps from the weights."""
    cell = model.model
    for name, parameter in cell.parameters_and_names():
        parameter.set_data(Tensor(weights[name]))
    step = TrainStep(cell.set_train(), OptimizerConfig(learning_rate=1e-3), **settings)
    step.set_num_passes(0)
    losses = [step(Tensor(1e-3, ms.float32), *inputs).loss.asnumpy() for _ in range(2)]
    return {name: one.asnumpy() for name, one in cell.parameters_and_names()} | {"losses": np.stack(losses)}


def assert_equal_steps(steps: list[dict[str, np.ndarray]]) -> None:
    first, *others = steps
    assert first["losses"][0] != first["losses"][1]
    for other in others:
        for name, array in first.items():
            if not name.endswith(UNSEEN):
                np.testing.assert_allclose(other[name], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=name)


def noisy(model, *, gate: bool = True, router: float = 3.0):
    """Switches the noise of a loaded model on; that of the router is so large that it changes the choice."""
    config = model.config.model
    config = replace(config, gate_noise=gate, router=replace(config.router, noise=router))
    cell = SlimeModel(config)
    for name, parameter in cell.parameters_and_names():
        parameter.set_data(dict(model.model.parameters_and_names())[name].value())
    model.model = cell
    return model


def test_recompute_and_graphs_give_the_same_steps_with_noise(opened):
    model, maker, collate = opened(mm_resampler_topp=0.5)
    model = noisy(model)
    choose_trainable(model.model, freeze=[], train={})
    inputs = arguments(model, collate([maker.make(number) for number in range(4)]))
    weights = {name: one.asnumpy().copy() for name, one in model.model.parameters_and_names()}
    steps = [stepped(model, weights, inputs, recompute=recompute) for recompute in (False, True)]
    ms.set_context(mode=ms.GRAPH_MODE)
    steps.append(stepped(model, weights, inputs))
    assert_equal_steps(steps)


@pytest.mark.parametrize("noise", [{"router": 0.0}, {"gate": False}, {}])
def test_noise_follows_from_the_pass_and_is_off_when_asking(opened, noise):
    model, maker, collate = opened(mm_resampler_topp=0.5)
    inputs = arguments(model, collate([maker.make(number) for number in range(4)]))
    quiet = model.model.set_train()(*inputs)[0].asnumpy()
    cell = noisy(model, **noise).model

    def loss(num_passes: int) -> np.ndarray:
        dropout_counter(cell).set_data(Tensor(num_passes, ms.int32))
        return cell(*inputs)[0].asnumpy()

    cell.set_train()
    assert loss(3) == loss(3) != loss(4) and quiet not in (loss(3), loss(4))
    if not noise:
        assert cell.mm_projector.noise.counter is cell.noise.counter, "one counter, which the step increments"
        assert (cell.mm_projector.noise(4, 8) != cell.noise(4, 8)).any(), "other values for the router"
    cell.set_train(False)
    np.testing.assert_allclose(loss(3), quiet, rtol=1e-6)


def test_noise_is_added_to_the_scores_before_the_temperature(opened):
    cell = noisy(opened(mm_resampler_temp=4.0)[0]).model.set_train()
    num_text, length = 5, 45
    rows = np.random.default_rng(0).normal(size=(length, 32)).astype(np.float32)
    choices = np.zeros((1, 2, length), np.int32)
    choices[0, 0, :num_text], choices[0, 1, num_text:] = 1, 1
    sources = Tensor(np.arange(length, dtype=np.int32)[None])
    order = cell.routed(Tensor(rows), sources, Tensor(choices)).asnumpy()[0]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = unit[num_text:] @ unit[:num_text].sum(0) + 3.0 * cell.noise(1, length).asnumpy()[0, num_text:]
    kept = np.concatenate((np.arange(num_text), num_text + kept_rows(scores, cell.config.router)))
    assert len(kept) < length and order[: len(kept)].tolist() == kept.tolist()


def test_training_keys_without_effect_are_refused(opened):
    model, _, _ = opened()
    config, noisy = model.config.model, replace(model.config.model.router, noise=0.1)
    for changes, message in (
        ({"gate": "mlp", "gate_noise": True}, "gate_noise has no effect with model.gate 'mlp' .*; set it to false"),
        ({"use": "local", "gate_noise": True}, "gate_noise has no effect with .* model.use 'local'; set it to false"),
        ({"use": "global", "router": noisy}, "router.noise has no effect with .* model.use 'global'; set it to 0"),
        (
            {"use": "global", "router": replace(config.router, sees_answers=False)},
            "router.sees_answers has no effect with .* model.use 'global'; set it to true",
        ),
    ):
        with pytest.raises(UserError, match=message):
            replace(config, **changes)
